"""An affine map of the last axis.

    out[..., n] = sum_i x[..., i] * weight[n, i] + bias[n]

Most of a transformer's time is spent here. At small batch the time is that of reading the weight once, at large batch
that of the multiplications (paper, section III-A).

Shapes: I inputs, N outputs.
"""

import torch
from einops import einsum
from torch import Tensor

from ..spec.weights import LinearWeights


def linear(x: Tensor, weights: LinearWeights) -> Tensor:
    """Map [..., I] to [..., N], in x's dtype; products and sums are float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = einsum(x.to(wide), weights.weight_NI.to(wide), "... i, n i -> ... n")
    if weights.bias_N is not None:
        out = out + weights.bias_N.to(wide)
    return out.to(x.dtype)
