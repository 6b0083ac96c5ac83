"""Rotary frequencies, made once, in float64: what every path applies and none computes.

    frequency[j] = base ** (-2j / size)      radians per token, for pair j of J = size / 2

(Su et al. 2021, section 3.2.2.) Models stretched to longer contexts scale these. Scaling is applied here, so that a
path sees frequencies alone. `rotary_fields` reads from a config which of them a model needs.

Shapes: J rotating pairs of a head.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.errors import ConfigError

MOST_SIZE = 2**16
"""Far above any head's size; what a damaged file says must not make a table larger than this."""


def frequencies(base: float, size: int) -> Tensor:
    """The unscaled frequencies of a head whose first `size` elements rotate: float64 [J].

    Of an odd size the last element rotates with the next one. Raises `ConfigError` for a size that no head has.

    >>> frequencies(10000.0, 4).tolist()
    [1.0, 0.01]
    """
    if not 0 < size <= MOST_SIZE:
        raise ConfigError(f"the rotary size is {size}; it must be from 1 to {MOST_SIZE}")
    exponent_J = torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size
    return 1 / torch.tensor(base, dtype=torch.float64, device="cpu") ** exponent_J


def scaled_linearly(frequency_J: Tensor, factor: float) -> Tensor:
    """Every position counts as position / factor (position interpolation, Chen et al. 2023)."""
    return frequency_J / factor


def scaled_by_band(frequency_J: Tensor, *, factor: float, low: float, high: float, original_context: int) -> Tensor:
    """LLaMA 3.1's scaling: slow pairs are divided by `factor`, fast ones kept, those between blended.

    A pair is slow or fast by how often it turns within the context that the model was first trained on: fewer than
    `low` turns is slow, more than `high` fast. Half-way between, with factor 8, the frequency is multiplied by
    0.5 / 8 + 0.5:

        >>> turns = torch.tensor([0.5, 2.5, 9.0], dtype=torch.float64)
        >>> plain = turns * 2 * math.pi / 100
        >>> (scaled_by_band(plain, factor=8, low=1, high=4, original_context=100) / plain).tolist()
        [0.125, 0.5625, 1.0]
    """
    turns_J = frequency_J * original_context / (2 * math.pi)
    kept_J = ((turns_J - low) / (high - low)).clamp(0, 1)
    return frequency_J * ((1 - kept_J) / factor + kept_J)


def scaled_by_index(
    frequency_J: Tensor,
    *,
    base: float,
    size: int,
    factor: float,
    fast: float,
    slow: float,
    original_context: int,
    whole: bool,
) -> Tensor:
    """YaRN's scaling (Peng et al. 2023, section 3.2): as `scaled_by_band`, but blended evenly over the pairs' indices.

    The pairs that turn `fast` and `slow` times within the original context bound the blend; with `whole`, the bounds
    are widened to whole indices.
    """

    def index(turns: float) -> float:
        return size * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = index(fast), index(slow)
    if whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first if last != first else 0.001  # no bounds between which to blend: a step
    index_J = torch.arange(len(frequency_J), dtype=torch.float64, device="cpu")
    scaled_J = ((index_J - first) / width).clamp(0, 1)
    return frequency_J * (scaled_J / factor + (1 - scaled_J))


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """By how much YaRN lengthens queries and keys: 0.1 * weight * ln(factor) + 1 (the same paper, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def divided(frequency_J: Tensor, divisors: Sequence[float]) -> Tensor:
    """LongRoPE's scaling (Ding et al. 2024): each pair by a divisor of its own, found by search."""
    return frequency_J / torch.tensor(divisors, dtype=torch.float64, device="cpu")


def note_on_long_texts(context: int, original: int) -> str:
    """What whoever opens a model with LongRoPE for texts longer than the original context should know."""
    return (
        f"positions are scaled for texts of up to {context} tokens; for texts of at most {original} they would be "
        f"scaled otherwise: open the model with a context of {original} for those"
    )


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """By how much LongRoPE lengthens queries and keys: sqrt(1 + ln(factor) / ln(original context))."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context))
