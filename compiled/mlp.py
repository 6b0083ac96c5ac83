"""What stands between an MLP's two products.

Shapes: T rows, F intermediate.
"""

import math

import torch
from torch import Tensor

from ..spec.config import Activation, MlpConfig
from .compute import accumulation_dtype


def activation(x: Tensor, kind: Activation) -> Tensor:
    """Return the non-linearity of each element, in x's dtype."""
    return _activation(x.to(accumulation_dtype(x.dtype)), kind).to(x.dtype)


def _activation(x: Tensor, kind: Activation) -> Tensor:
    if kind is Activation.SILU:
        return x / (1 + torch.exp(-x))
    if kind is Activation.GELU_SIGMOID:
        return x / (1 + torch.exp(-1.702 * x))
    if kind is Activation.RELU:
        return x.clamp_min(0)
    if kind is Activation.GELU:
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gated(both: Tensor, kind: Activation, clamp: float | None = None, up_offset: float = 0.0) -> Tensor:
    """Return activation(gate) * (up + up_offset) [T, F] of [T, 2 F], the gate first, rounded once.

    With `clamp`, gate is cut to at most clamp and up to -clamp .. clamp before.
    """
    gate_TF, up_TF = both.to(accumulation_dtype(both.dtype)).chunk(2, dim=1)
    if clamp is not None:
        gate_TF, up_TF = gate_TF.clamp_max(clamp), up_TF.clamp(-clamp, clamp)
    if up_offset:
        up_TF = up_TF + up_offset
    return (_activation(gate_TF, kind) * up_TF).to(both.dtype)


def inner(up: Tensor, config: MlpConfig) -> Tensor:
    """Return what the second product multiplies, [T, F], of what the first returned."""
    if config.gated:
        return gated(up, config.activation, config.clamp, config.up_offset)
    return activation(up, config.activation)
