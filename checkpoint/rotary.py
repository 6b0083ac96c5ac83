"""Rotary frequencies, made once, in float64: what every path applies and none computes.

    frequency[j] = base ** (-2j / size)      radians per token, for pair j of J = size / 2

(Su et al. 2021, section 3.2.2.) Models stretched to longer contexts scale these. Scaling is applied here, so that a
path sees frequencies alone.

Shapes: J rotating pairs of a head.
"""

import math

import torch
from torch import Tensor

from ..spec.errors import ConfigError
from .fields import Fields

MOST_SIZE = 2**16
"""Far above any head's size; what a damaged file says must not make a table larger than this."""


def frequencies(base: float, size: int) -> Tensor:
    """The unscaled frequencies of a head whose first `size` elements rotate: float64 [J].

    Raises `ConfigError` for a size that no head has.

    >>> frequencies(10000.0, 4).tolist()
    [1.0, 0.01]
    """
    if not 0 < size <= MOST_SIZE:
        raise ConfigError(f"the rotary size is {size}; it must be from 1 to {MOST_SIZE}")
    exponent_J = torch.arange(0, size, 2, dtype=torch.float64) / size
    return 1 / torch.tensor(base, dtype=torch.float64) ** exponent_J


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


def from_config(config: Fields, size: int, *, default_base: float = 10000.0) -> Tensor:
    """Read a config.json's rotary fields, in the older style or the newer, and make the frequencies they mean.

    Newer: `rope_parameters` holds everything. Older: `rope_theta` is the base, and `rope_scaling` the rest, if any.
    Raises `ConfigError` for a kind of scaling that is not known here.
    """
    base = config.number("rope_theta", default_base)
    scaling = config.section("rope_scaling")
    parameters = config.section("rope_parameters")
    if parameters is not None:
        if scaling is not None:
            raise ConfigError(f"{config.where}: rope_scaling and rope_parameters are both given; leave one of them out")
        base = parameters.number("rope_theta", base)
        parameters.only("partial_rotary_factor", 1.0, 1)
        scaling = parameters
    return _scaled(frequencies(base, size), scaling)


def _scaled(frequency_J: Tensor, scaling: Fields | None) -> Tensor:
    if scaling is None:
        return frequency_J
    kinds = {kind: kind for kind in ("default", "linear", "llama3")}
    older = scaling.choice("type", kinds, "default")
    kind = scaling.choice("rope_type", kinds, older)
    if kind == "linear":
        frequency_J = scaled_linearly(frequency_J, scaling.number("factor"))
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if high <= low:
            raise ConfigError(f"{scaling.where}high_freq_factor is {high}; it must be above low_freq_factor, {low}")
        frequency_J = scaled_by_band(
            frequency_J,
            factor=scaling.number("factor"),
            low=low,
            high=high,
            original_context=scaling.integer("original_max_position_embeddings"),
        )
    scaling.finish()
    return frequency_J
