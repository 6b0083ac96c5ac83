"""Keeping matrices in fewer bits.

Int8, symmetric, one scale a row:

    scale[n] = max_i |weight[n, i]| / 127        code[n, i] = round(weight[n, i] / scale[n])

rounded half to even, so codes lie in -127 .. 127 and -128 is never used. The weight that counts from then on is
code * scale: whatever computes with it is compared on exactly that. This is the weight half of the INT8 of the paper's
section III-D, which quantises activations as well; its public code uses groups along the flattened weight.

Shapes: N rows (outputs), I inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec.config import Storage


@dataclass(frozen=True, slots=True, eq=False)
class RowQuantised:
    code_NI: Tensor
    """int8, -127 .. 127."""
    scale_N: Tensor
    """float32; zero for a row of zeros."""


def quantise_rows(weight_NI: Tensor) -> RowQuantised:
    """Quantise each row by its own largest magnitude; scale and quotient are rounded to float32.

    >>> quantise_rows(torch.tensor([[127.0, 2.5, -3.5, 0.0]])).code_NI.tolist()
    [[127, 2, -4, 0]]
    """
    weight_NI = weight_NI.to(torch.float32)
    scale_N = weight_NI.abs().amax(-1) / 127
    divisor_N1 = scale_N.where(scale_N > 0, 1.0)[:, None]  # a row of zeros has scale 0 and codes 0
    code_NI = torch.round(weight_NI / divisor_N1)  # torch rounds half to even
    return RowQuantised(code_NI.clamp(-127, 127).to(torch.int8), scale_N)


def dequantise_rows(quantised: RowQuantised, dtype: torch.dtype) -> Tensor:
    """code * scale as [N, I]; exact in float64 (7 + 24 bits), rounded once in float32."""
    return quantised.code_NI.to(dtype) * quantised.scale_N.to(dtype)[:, None]


def stored(weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """The matrix as it comes back out of storage, in `dtype`."""
    match storage:
        case Storage.FLOAT32:
            return weight_NI.to(torch.float32).to(dtype)
        case Storage.BFLOAT16:
            return weight_NI.to(torch.bfloat16).to(dtype)
        case Storage.INT8:
            return dequantise_rows(quantise_rows(weight_NI), dtype)
