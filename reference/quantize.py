"""Keeping matrices in fewer bits.

Int8, symmetric, one scale a row:

    scale[n] = max_i |weight[n, i]| / 127        code[n, i] = round(weight[n, i] / scale[n])

rounded half to even, so codes lie in -127 .. 127 and -128 is never used. The weight that counts from then on is
code * scale: whatever computes with it is compared on exactly that. This is the weight half of the INT8 of the paper's
section III-D, which quantizes activations as well; its public code uses groups along the flattened weight.

Int4, asymmetric, over groups g of 64 consecutive inputs of one row, the last of which may be shorter:

    low[n, g] = min_g weight        step[n, g] = (max_g weight - low[n, g]) / 15
    code[n, i] = round((weight[n, i] - low[n, g]) / step[n, g])

rounded half to even, so codes lie in 0 .. 15. The weight that counts is code * step + low. This is the 4-bit format of
ZeRO-Inference (2023), which keeps scale = 15 / (max - min), the step's reciprocal, and reads q / scale + min.

Shapes: N rows (outputs), I inputs, G groups of a row, C inputs of a group.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..spec.config import INT4_GROUP, Storage


@dataclass(frozen=True, slots=True, eq=False)
class RowQuantized:
    quantized_NI: Tensor
    """int8, -127 .. 127."""
    scale_N: Tensor
    """float32; zero for a row of zeros."""


def quantize_rows(weight_NI: Tensor) -> RowQuantized:
    """Quantize each row by its own largest magnitude; scale and quotient are rounded to float32.

    >>> quantize_rows(torch.tensor([[127.0, 2.5, -3.5, 0.0]])).quantized_NI.tolist()
    [[127, 2, -4, 0]]
    """
    weight_NI = weight_NI.to(torch.float32)
    scale_N = weight_NI.abs().amax(-1) / 127
    divisor_N1 = scale_N.where(scale_N > 0, 1.0)[:, None]  # a row of zeros has scale 0 and codes 0
    quantized_NI = torch.round(weight_NI / divisor_N1)  # torch rounds half to even
    return RowQuantized(quantized_NI.clamp(-127, 127).to(torch.int8), scale_N)


def dequantize_rows(quantized: RowQuantized, dtype: torch.dtype) -> Tensor:
    """code * scale as [N, I]; exact in float64 (7 + 24 bits), rounded once in float32."""
    return quantized.quantized_NI.to(dtype) * quantized.scale_N.to(dtype)[:, None]


@dataclass(frozen=True, slots=True, eq=False)
class GroupQuantized:
    quantized_NI: Tensor
    """uint8, 0 .. 15."""
    scale_NG: Tensor
    """float32; zero for a group of equal weights."""
    min_NG: Tensor
    """float32: what code 0 stands for."""


def quantize_groups(weight_NI: Tensor) -> GroupQuantized:
    """Quantize each group of each row between its own least and largest; each operation rounds to float32.

    A group of equal weights has step 0 and codes 0 and stays as it is; so narrow a group that its step underflows
    becomes its least weight. A group that holds something not finite, or whose range overflows, becomes NaN.

    >>> quantized = quantize_groups(torch.tensor([[-1.0, 14.0, 1.5, 2.5] + 60 * [3.0] + 6 * [7.0]]))
    >>> quantized.quantized_NI[:, [0, 1, 2, 3, 4, 64, 69]].tolist()
    [[0, 15, 2, 4, 4, 0, 0]]
    >>> quantized.scale_NG.tolist(), quantized.min_NG.tolist()
    ([[1.0, 0.0]], [[-1.0, 7.0]])
    """
    inputs = weight_NI.shape[1]
    whole = torch.arange(-(-inputs // INT4_GROUP) * INT4_GROUP, device=weight_NI.device)
    filled_NI = weight_NI.to(torch.float32)[:, whole.clamp_max(inputs - 1)]  # repeats the last: same least and largest
    weight_NGC = rearrange(filled_NI, "n (g c) -> n g c", c=INT4_GROUP)
    min_NG = weight_NGC.amin(-1)
    scale_NG = (weight_NGC.amax(-1) - min_NG) / 15
    divisor_NG1 = scale_NG.where(scale_NG > 0, torch.inf)[..., None]  # a group of step 0 has codes 0
    quantized_NGC = torch.round((weight_NGC - min_NG[..., None]) / divisor_NG1).nan_to_num(
        0.0
    )  # torch rounds half to even
    quantized_NGC = quantized_NGC.clamp(0, 15).to(torch.uint8)
    return GroupQuantized(rearrange(quantized_NGC, "n g c -> n (g c)")[:, :inputs], scale_NG, min_NG)


def dequantize_groups(quantized: GroupQuantized, dtype: torch.dtype) -> Tensor:
    """code * step + low as [N, I], each operation in `dtype`.

    In float64 the product is exact (4 + 24 bits) and the sum rounds once; it too is exact unless low is tiny beside the
    step. In float32 both round.
    """
    step_NI, low_NI = (
        repeat(each_NG.to(dtype), "n g -> n (g c)", c=INT4_GROUP)[:, : quantized.quantized_NI.shape[1]]
        for each_NG in (quantized.scale_NG, quantized.min_NG)
    )
    return quantized.quantized_NI.to(dtype) * step_NI + low_NI


def stored(weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """The matrix as it comes back out of storage, in `dtype`."""
    match storage:
        case Storage.FLOAT32:
            return weight_NI.to(torch.float32).to(dtype)
        case Storage.BFLOAT16:
            return weight_NI.to(torch.bfloat16).to(dtype)
        case Storage.INT8:
            return dequantize_rows(quantize_rows(weight_NI), dtype)
        case Storage.INT4:
            return dequantize_groups(quantize_groups(weight_NI), dtype)
