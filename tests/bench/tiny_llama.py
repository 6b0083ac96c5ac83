"""A plain LLaMA that is small, and not square anywhere."""

from dataclasses import replace

from torch import Tensor

from twinfer.oracle.models import RandomSource
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from twinfer.spec.weights import LayerWeights

VOCABULARY = 96


def llama(*, head: Head = Head.UNTIED, gated: bool = True, layers: int = 2, hidden: int = 32) -> ModelConfig:
    norm = NormConfig(kind=NormKind.RMS, epsilon=2.0**-17)  # a float32, which is what GGUF keeps
    rotary = RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=16)
    attention = AttentionConfig(heads=4, kv_heads=2, head_size=16, scale=16**-0.5, rotary=rotary)
    mlp = MlpConfig(width=160, activation=Activation.SILU, gated=gated)
    layer = LayerConfig(norm=norm, attention=attention, mlp=mlp)
    return ModelConfig(
        family="llama",
        hidden=hidden,
        vocabulary=VOCABULARY,
        context=64,
        layers=(layer,) * layers,
        final_norm=norm,
        learned_positions=False,
        head=head,
    )


class Scaled(RandomSource):
    """With frequencies of no single base, as models for long texts have."""

    def layer(self, index: int) -> LayerWeights:
        weights = super().layer(index)
        frequency_J = weights.attention.rotary_frequency_J
        assert frequency_J is not None
        scaled_J: Tensor = frequency_J.clone()
        scaled_J[3:] /= 8
        return replace(weights, attention=replace(weights.attention, rotary_frequency_J=scaled_J))
