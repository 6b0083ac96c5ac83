"""A product of 8-bit integers: weights and activations both quantized, as the paper's INT8 does it (section III-D).

    out[b, n] = (sum_i a[b, i] * w[n, i]) * activation_scale[b] * weight_scale[n] + bias[n]

The codes w of the weights are made once. The codes a are made on the fly, symmetric, one scale a row of x (its largest
magnitude / 127): in the paper Deep-Fusion has the operation before the product do that. The sum is of integers, in
int32, and exact; both scales are applied to it at the end, in the paper in the epilogue of its CUTLASS kernel.

What it costs, beside the same weights with x as it is: a code stands for x within half a step, so

    |out[b, n] - exact[b, n]|  <=  activation_scale[b] / 2 * sum_i |weight[n, i]|

where weight is code * scale (`quantize_rows`). One large element of a row makes the step of all its elements large.

Shapes: B rows of x, I inputs, N outputs.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from ..spec.errors import RequestError
from .quantize import RowQuantized, quantize_rows

MOST_INPUTS = 2**31 // 127**2
"""As many products of two codes an int32 holds, whatever they are."""


def integer_product(quantized_BI: Tensor, quantized_NI: Tensor) -> Tensor:
    """Sums of products of int8 codes in -127 .. 127, as int32 [B, N]; exact.

    Raises `RequestError` for more than 133144 inputs, whose sum an int32 may not hold.
    """
    inputs = quantized_BI.shape[-1]
    if inputs > MOST_INPUTS:
        raise RequestError(f"a product of int8 codes has {inputs} inputs; it must have at most {MOST_INPUTS}")
    return einsum(quantized_BI.to(torch.int32), quantized_NI.to(torch.int32), "b i, n i -> b n")


def linear_w8a8(x: Tensor, weights: RowQuantized, bias_N: Tensor | None = None) -> Tensor:
    """Map [..., I] to [..., N], in x's dtype; scales and bias are applied in float32 or wider.

    Codes and scales of x are float32's, whatever x's dtype. A row of x that holds something not finite has no finite
    result.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    row = quantize_rows(rearrange(x, "... i -> (...) i"))
    sum_BN = integer_product(row.quantized_NI, weights.quantized_NI).to(wide)
    out_BN = sum_BN * row.scale_N.to(wide)[:, None] * weights.scale_N.to(wide)
    if bias_N is not None:
        out_BN = out_BN + bias_N.to(wide)
    return out_BN.reshape(*x.shape[:-1], -1).to(x.dtype)
