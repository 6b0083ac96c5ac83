"""The feed-forward half of a layer, plain or gated.

    plain:  out = down(activation(up(x)))
    gated:  out = down(activation(gate(x)) * up(x))          Shazeer 2020

gpt-oss cuts gate(x) and up(x) before the activation, and adds 1 to up(x) (`MlpConfig.clamp`, `up_offset`).

The paper fuses what stands between the two products into the first of them (section III-D, region 3 of Fig. 1c).

Shapes: B batch, T tokens, M hidden, F intermediate.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.config import Activation, MlpConfig
from ..spec.weights import LinearWeights, MlpWeights
from .linear import linear as plain_linear


def activation(x: Tensor, kind: Activation) -> Tensor:
    """Apply the non-linearity to each element, computed in float32 or wider; returns x's shape and dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    match kind:
        case Activation.GELU:  # x * Phi(x); erfc(-z) = 1 + erf(z), but keeps its digits where the sum would cancel
            out = wide * 0.5 * torch.erfc(-wide / math.sqrt(2))
        case Activation.GELU_TANH:  # Hendrycks, Gimpel 2016, section 2
            out = wide * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        case Activation.GELU_SIGMOID:  # the same paper and section
            out = wide * torch.sigmoid(1.702 * wide)
        case Activation.RELU:
            out = wide.clamp_min(0)
        case Activation.SILU:
            out = wide * torch.sigmoid(wide)
    return out.to(x.dtype)


def mlp(
    x_BTM: Tensor,
    weights: MlpWeights,
    config: MlpConfig,
    *,
    linear: Callable[[Tensor, LinearWeights], Tensor] = plain_linear,
) -> Tensor:
    """Feed each token forward; returns [B, T, M] in x's dtype."""
    up_BTF = linear(x_BTM, weights.up)
    if weights.gate is None:
        return linear(activation(up_BTF, config.activation), weights.down)
    gate_BTF = linear(x_BTM, weights.gate)
    if config.clamp is not None:
        gate_BTF, up_BTF = gate_BTF.clamp(max=config.clamp), up_BTF.clamp(-config.clamp, config.clamp)
    return linear(activation(gate_BTF, config.activation) * (up_BTF + config.up_offset), weights.down)
