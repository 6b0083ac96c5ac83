"""Norms over the hidden axis, in x's dtype; sums and gains are float32 or wider.

In a graph each fuses with the addition before it into one pass.

Shapes: T rows, M hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import NormConfig, NormKind
from .precision import accumulation_dtype


class Norm(NamedTuple):
    gain_M: Tensor
    """What multiplies, whether or not it was stored as its distance from 1."""
    bias_M: Tensor | None


def norm(x_TM: Tensor, gain_M: Tensor, bias_M: Tensor | None, config: NormConfig) -> Tensor:
    """The norm that the config names: `rms_norm` or `layer_norm`."""
    if config.kind is NormKind.RMS:
        return rms_norm(x_TM, gain_M, config.epsilon)
    return layer_norm(x_TM, gain_M, bias_M, config.epsilon)


def rms_norm(x_TM: Tensor, gain_M: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x ** 2) + epsilon) * gain."""
    wide_TM = x_TM.to(accumulation_dtype(x_TM.dtype))
    return (wide_TM * torch.rsqrt((wide_TM * wide_TM).mean(-1, keepdim=True) + epsilon) * gain_M).to(x_TM.dtype)


def layer_norm(x_TM: Tensor, gain_M: Tensor, bias_M: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(var + epsilon) * gain (+ bias), the variance taken from the centered values."""
    wide_TM = x_TM.to(accumulation_dtype(x_TM.dtype))
    centered_TM = wide_TM - wide_TM.mean(-1, keepdim=True)
    out_TM = centered_TM * torch.rsqrt((centered_TM * centered_TM).mean(-1, keepdim=True) + epsilon) * gain_M
    return (out_TM if bias_M is None else out_TM + bias_M).to(x_TM.dtype)
