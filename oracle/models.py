"""Small random models: a drawn config, and a weight source that fills any config from a seed.

Two families at the extremes (LLaMA-like, GPT-2-like) and everything between: each convention is drawn on its own, so a
path that handles only the combinations that published models have is found out.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    QkNormSpan,
    Residual,
    RotaryConfig,
    RotaryLayout,
)
from ..spec.moe import ROUTERS, MoeConfig
from ..spec.shapes import Shapes, embedding_shapes, head_shapes, layer_shapes
from ..spec.shard import Shard, embedding_slices, head_slices, layer_slices
from ..spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, assemble, sliced
from .case import Picker


def draw_model_config(pick: Picker, *, context: int = 64) -> ModelConfig:
    """A decoder of one to three layers, whose windows, caps and magnitudes may differ from layer to layer."""
    norm = draw_norm(pick)
    placement, residual = draw_norms(pick)
    residual_scale = pick.choice([1.0, 0.25])
    mlp = MlpConfig(
        width=pick.integer(1 if placement in (NormPlacement.PRE_NORM, NormPlacement.POST_NORM) else 8, 24),
        activation=pick.choice(list(Activation)),
        gated=pick.choice([True, False]),
        bias=pick.choice([False, True]),
    )
    attention = draw_attention(pick)

    def layer() -> LayerConfig:
        window, softcap = pick.choice([None, 1, 3, 7]), pick.choice([None, None, 2.0])
        magnitude = pick.choice([1.0, 1.25])
        rotary = None if attention.rotary is None else replace(attention.rotary, attention_factor=magnitude)
        return LayerConfig(
            norm=norm,
            attention=replace(attention, window=window, softcap=softcap, rotary=rotary),
            mlp=mlp,
            norm_placement=placement,
            residual=residual,
            residual_scale=residual_scale,
        )

    return ModelConfig(
        family="random",
        hidden=pick.integer(3, 20),  # at 2 a layer norm is nearly a sign, and rows near its step fail
        vocabulary=pick.integer(2, 50),
        context=context,
        layers=tuple(layer() for _ in range(pick.integer(1, 3))),
        final_norm=pick.choice([norm, norm, None]),
        learned_positions=pick.choice([False, True]),
        head=pick.choice([Head.TIED, Head.UNTIED]),
        embedding_size=pick.choice([None, None, 3, 8]),
        embedding_scale=pick.choice([1.0, 3.0]),
        embedding_norm=pick.choice([None, norm]),
        token_types=pick.choice([0, 0, 2]),
        head_bias=pick.choice([False, True]),
        logit_scale=pick.choice([1.0, 0.5]),
        logit_softcap=pick.choice([None, None, 4.0]),
    )


def draw_moe_config(pick: Picker, *, context: int = 64) -> ModelConfig:
    """A decoder some of whose layers have experts in the place of their MLP, by any published recipe."""
    config = draw_model_config(pick, context=context)
    mixtures = pick.integer(0, len(config.layers) - 1)
    layers = [
        replace(layer, mlp=draw_moe(pick, layer.mlp)) if index == mixtures or pick.integer(0, 1) else layer
        for index, layer in enumerate(config.layers)
        if isinstance(layer.mlp, MlpConfig)
    ]
    return replace(config, layers=tuple(layers))


def draw_moe(pick: Picker, mlp: MlpConfig) -> MoeConfig:
    """Four to eight experts, up to three a token; no capacity, which would tie the sequences of a batch together."""
    name, experts, groups = pick.choice(sorted(ROUTERS)), pick.choice([4, 6, 8]), pick.choice([1, 1, 2])
    kept = pick.integer(1, groups)
    top_k = pick.integer(1, min(3, experts // groups * kept))
    router = replace(ROUTERS[name], experts=experts, top_k=top_k, groups=groups, kept_groups=kept)
    beside = pick.choice(["nothing", "shared", "gated", "residual"])
    return MoeConfig(
        router=router,
        expert=mlp,
        shared=mlp if beside in ("shared", "gated") else None,
        shared_gate=beside == "gated",
        residual=mlp if beside == "residual" else None,
    )


def draw_encoder_config(pick: Picker, *, context: int = 64) -> ModelConfig:
    """The same without a head, and every token sees the later ones too."""
    config = draw_model_config(pick, context=context)

    def seeing(layer: LayerConfig) -> LayerConfig:
        return replace(layer, attention=replace(layer.attention, causal=False, alibi=False))

    layers = tuple(seeing(layer) for layer in config.layers)
    return replace(config, layers=layers, head=Head.NONE, head_bias=False)


def draw_attention(pick: Picker) -> AttentionConfig:
    """With any positions, any biases, any number of key/value heads."""
    kv_heads, group = pick.integer(1, 3), pick.integer(1, 3)
    head_size = 2 * pick.integer(1, 4)
    kinds = list(NormKind) if head_size > 2 else [NormKind.RMS]
    layout, size = pick.choice(list(RotaryLayout)), pick.integer(0, head_size // 2)
    return AttentionConfig(
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_size=head_size,
        scale=head_size**-0.5,
        rotary=RotaryConfig(layout=layout, size=2 * size) if size else None,
        qkv_bias=pick.choice([False, True]),
        output_bias=pick.choice([False, True]),
        alibi=pick.choice([False, False, True]),
        qkv_clip=pick.choice([None, None, 1.0]),
        qk_norm=draw_norm(pick, kinds) if pick.integer(0, 1) else None,
        qk_norm_span=pick.choice(list(QkNormSpan)),
    )


def draw_norm(pick: Picker, kinds: Sequence[NormKind] = tuple(NormKind)) -> NormConfig:
    return NormConfig(
        kind=pick.choice(kinds),
        epsilon=pick.choice([1e-5, 1e-6]),
        bias=pick.choice([True, False]),
        gain_from_one=pick.choice([False, True]),
    )


def draw_norms(pick: Picker) -> tuple[NormPlacement, Residual]:
    """Where the norms stand and what the MLP reads."""
    placement = pick.choice([*NormPlacement, NormPlacement.PRE_NORM, NormPlacement.PRE_NORM])
    alone = placement is not NormPlacement.PRE_NORM
    return placement, Residual.SEQUENTIAL if alone else pick.choice([*Residual, Residual.SEQUENTIAL])


class RandomSource:
    """Normal weights scaled by 1 / sqrt(inputs), so that activations stay of order one. Reads are repeatable."""

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self._seed = seed
        self._dtype = dtype

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        weights = assemble(EmbeddingWeights, self._drawn("embedding", embedding_shapes(self.config)))
        return weights if shard is None else sliced(weights, embedding_slices(self.config, shard))

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        shapes = layer_shapes(self.config.layers[index], self.config.hidden)
        weights = assemble(LayerWeights, self._drawn(f"layer {index}", shapes))
        return weights if shard is None else sliced(weights, layer_slices(self.config, index, shard))

    def head(self, shard: Shard | None = None) -> HeadWeights:
        weights = assemble(HeadWeights, self._drawn("head", head_shapes(self.config)))
        return weights if shard is None else sliced(weights, head_slices(self.config, shard))

    def _drawn(self, part: str, shapes: Shapes) -> dict[str, Tensor]:
        return {name: self._tensor(part, name, shape) for name, shape in shapes.items()}

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        match name.rpartition(".")[2]:
            case "rotary_frequency_J":
                return torch.logspace(0, 1 - shape[0], shape[0], dtype=torch.float64)
            case "alibi_slope_H":
                step_H = torch.arange(1, shape[0] + 1, dtype=torch.float64)
                return torch.exp2(-8 * step_H / shape[0])
            case "weight_NI" | "weight_ENI":
                return self._normal(part, name, shape) / math.sqrt(shape[-1])
            case "gain_M":
                return 1 + 0.1 * self._normal(part, name, shape)
        return self._normal(part, name, shape)

    def _normal(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {part} {name}".encode()))
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(self._dtype)
