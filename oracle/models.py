"""Small random models: a drawn config, and a weight source that fills any config from a seed.

Two families at the extremes (LLaMA-like, GPT-2-like) and everything between: each convention is drawn on its own, so a
path that handles only the combinations that published models have is found out.
"""

import zlib

import torch
from torch import Tensor

from ..spec.config import (
    Activation,
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from ..spec.weights import (
    AttentionWeights,
    EmbeddingWeights,
    HeadWeights,
    LayerWeights,
    LinearWeights,
    MlpWeights,
    NormWeights,
)
from .case import Picker


def draw_model_config(pick: Picker, *, context: int = 64) -> ModelConfig:
    """A decoder of one to three layers, whose windows may differ from layer to layer."""
    kv_heads, group = pick.integer(1, 3), pick.integer(1, 3)
    head_size = 2 * pick.integer(1, 4)
    norm = NormConfig(kind=pick.choice(list(NormKind)), epsilon=pick.choice([1e-5, 1e-6]))
    rotary_size = 2 * pick.integer(0, head_size // 2)
    rotary = RotaryConfig(layout=pick.choice(list(RotaryLayout)), size=rotary_size) if rotary_size else None
    mlp = MlpConfig(
        width=pick.integer(1, 24),
        activation=pick.choice(list(Activation)),
        gated=pick.choice([True, False]),
        bias=pick.choice([False, True]),
    )
    qkv_bias, output_bias = pick.choice([False, True]), pick.choice([False, True])
    windows = [pick.choice([None, 1, 3, 7]) for _ in range(pick.integer(1, 3))]

    def layer(window: int | None) -> LayerConfig:
        attention = AttentionConfig(
            heads=kv_heads * group,
            kv_heads=kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            window=window,
            rotary=rotary,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
        )
        return LayerConfig(norm=norm, attention=attention, mlp=mlp)

    return ModelConfig(
        family="random",
        hidden=pick.integer(3, 20),  # at 2 a layer norm is nearly a sign, and rows near its step fail
        vocabulary=pick.integer(2, 50),
        context=context,
        layers=tuple(layer(window) for window in windows),
        final_norm=norm,
        learned_positions=pick.choice([False, True]),
        tied_head=pick.choice([True, False]),
    )


class RandomSource:
    """Normal weights scaled by 1 / sqrt(inputs), so that activations stay of order one. Reads are repeatable."""

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self._seed = seed
        self._dtype = dtype

    def embedding(self) -> EmbeddingWeights:
        config = self.config
        return EmbeddingWeights(
            token_VM=self._normal("token", config.vocabulary, config.hidden),
            position_PM=self._normal("position", config.context, config.hidden) if config.learned_positions else None,
        )

    def layer(self, index: int) -> LayerWeights:
        config, name, hidden = self.config.layers[index], f"layer {index} ", self.config.hidden
        attention, mlp = config.attention, config.mlp
        query_width, kv_width = attention.heads * attention.head_size, attention.kv_heads * attention.head_size
        pairs = attention.rotary.size // 2 if attention.rotary else 0
        return LayerWeights(
            attention_norm=self._norm(name + "attention_norm", config.norm),
            attention=AttentionWeights(
                query=self._linear(name + "query", query_width, hidden, attention.qkv_bias),
                key=self._linear(name + "key", kv_width, hidden, attention.qkv_bias),
                value=self._linear(name + "value", kv_width, hidden, attention.qkv_bias),
                output=self._linear(name + "output", hidden, query_width, attention.output_bias),
                rotary_frequency_J=10.0 ** -torch.arange(pairs, dtype=torch.float64) if pairs else None,
            ),
            mlp_norm=self._norm(name + "mlp_norm", config.norm),
            mlp=MlpWeights(
                up=self._linear(name + "up", mlp.width, hidden, mlp.bias),
                down=self._linear(name + "down", hidden, mlp.width, mlp.bias),
                gate=self._linear(name + "gate", mlp.width, hidden, mlp.bias) if mlp.gated else None,
            ),
        )

    def head(self) -> HeadWeights:
        config = self.config
        tied = config.tied_head
        return HeadWeights(
            norm=self._norm("head norm", config.final_norm),
            projection=None if tied else self._linear("head", config.vocabulary, config.hidden, bias=False),
        )

    def _linear(self, name: str, outputs: int, inputs: int, bias: bool) -> LinearWeights:
        return LinearWeights(
            weight_NI=self._normal(name + " weight", outputs, inputs) * inputs**-0.5,
            bias_N=self._normal(name + " bias", outputs) if bias else None,
        )

    def _norm(self, name: str, config: NormConfig) -> NormWeights:
        return NormWeights(
            gain_M=1 + 0.1 * self._normal(name + " gain", self.config.hidden),
            bias_M=self._normal(name + " bias", self.config.hidden) if config.kind is NormKind.LAYER else None,
        )

    def _normal(self, name: str, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        return torch.randn(*shape, generator=generator, dtype=torch.float32).to(self._dtype)
