"""Which models the peers are given: plain LLaMAs, which every one of them knows how to run.

Shapes: J rotating pairs.
"""

import torch
from torch import Tensor

from ...spec.config import (
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
from ...spec.errors import RequestError


def check_llama_like(config: ModelConfig) -> None:
    """Raise `RequestError` for a model that has more than sizes to tell it from other LLaMAs."""
    if config != _llama_like(config):
        raise RequestError(f"this comparison is for LLaMA-like models; the model given is of family {config.family}")


def rotary_base(frequency_J: Tensor) -> float | None:
    """The base of plain frequencies, base ** (-j / J); None for others, such as scaled ones.

    >>> rotary_base(torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))
    10000.0
    >>> rotary_base(torch.tensor([1.0, 0.1, 0.01, 0.002], dtype=torch.float64))
    """
    pairs = len(frequency_J)
    if pairs == 1:
        return 10000.0 if float(frequency_J) == 1.0 else None
    base = round(float(frequency_J[-1]) ** (-pairs / (pairs - 1)), 3)
    return base if torch.allclose(plain_frequencies(base, pairs), frequency_J, rtol=1e-5, atol=0.0) else None


def plain_frequencies(base: float, pairs: int) -> Tensor:
    """base ** (-j / J), float64."""
    return torch.tensor(base, dtype=torch.float64) ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def _llama_like(config: ModelConfig) -> ModelConfig:
    """The LLaMA of the same sizes: whatever the config has besides them, this has not."""
    first = config.layers[0]
    head_size = first.attention.head_size
    norm = NormConfig(kind=NormKind.RMS, epsilon=first.norm.epsilon)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(
            heads=first.attention.heads,
            kv_heads=first.attention.kv_heads,
            head_size=head_size,
            scale=head_size**-0.5,
            rotary=RotaryConfig(layout=RotaryLayout.HALF_SPLIT, size=head_size),
        ),
        mlp=MlpConfig(width=first.dense_mlp.width, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family=config.family,
        hidden=config.hidden,
        vocabulary=config.vocabulary,
        context=config.context,
        layers=(layer,) * len(config.layers),
        final_norm=norm,
        learned_positions=False,
        head=config.head,
    )
