"""A product of 8-bit integers: activations quantized on the fly, int8 products, scales applied at the end.

Why it is faster: weights stay one byte, none is converted, and processors with VNNI instructions multiply four pairs of
bytes and add them at once. What it relies on: `torch._int_mm`, which oneDNN computes. Without such instructions oneDNN
adds pairs of products in 16 bits, which saturate: results are wrong, and nothing says so. So a trial product chooses
the form (`form_here`), and the other form computes the same integers in float32: of codes in -127 .. 127, sums of 1040
products stay below 2 ** 24 and are exact in any order.

Shapes: R rows, N outputs, I inputs.
"""

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .compute import accumulation_dtype
from .linear import materialized
from .packing import quantize_rows

PIECE = 2**24 // 127**2
"""Inputs whose products float32 adds exactly."""


class Form(StrEnum):
    """How sums of products of int8 codes are computed; both are exact."""

    INT8 = "int8"
    FLOAT32 = "float32"
    """In pieces of 1040 inputs; the codes are kept as float32."""


class Codes(NamedTuple):
    """A quantized matrix as a graph sees it."""

    quantized_NI: Tensor
    """int8, or the same integers in float32."""
    scale_N: Tensor
    bias_N: Tensor | None


def form_here(device: torch.device) -> Form:
    """INT8 on a CPU that multiplies int8 exactly, else FLOAT32.

    On a GPU torch's int8 product takes more than 16 rows alone, and inputs and outputs in eights: FLOAT32 there.
    """
    if device.type != "cpu":
        return Form.FLOAT32
    extreme = torch.full((8, 8), 127, dtype=torch.int8, device="cpu")
    return Form.INT8 if bool((torch._int_mm(extreme, extreme) == 8 * 127**2).all()) else Form.FLOAT32


def prepare(weight_NI: Tensor, bias_N: Tensor | None, form: Form) -> Codes:
    """Quantize a matrix of any float dtype, once; the result shares no memory with it."""
    quantized_NI, scale_N = quantize_rows(weight_NI)
    quantized_NI = quantized_NI if form is Form.INT8 else quantized_NI.to(torch.float32)
    return Codes(quantized_NI, scale_N, None if bias_N is None else bias_N.to(torch.float32, copy=True))


def integer_product(quantized_RI: Tensor, quantized_NI: Tensor, form: Form) -> Tensor:
    """Return sums of products of codes in -127 .. 127, as int32 [R, N], of at most 133144 inputs.

    Both are contiguous: where memory has gaps, torch._int_mm adds in float32.
    """
    if form is Form.INT8:
        if quantized_RI.shape[1] == 1:  # of one input torch._int_mm makes nonsense (torch 2.13)
            quantized_RI, quantized_NI = functional.pad(quantized_RI, (0, 1)), functional.pad(quantized_NI, (0, 1))
        return torch._int_mm(quantized_RI, quantized_NI.t())
    pieces = zip(*(torch.split(code.to(torch.float32), PIECE, 1) for code in (quantized_RI, quantized_NI)), strict=True)
    sums = [functional.linear(piece_RI, piece_NI).to(torch.int32) for piece_RI, piece_NI in pieces]
    return torch.stack(sums).sum(0, dtype=torch.int32) if len(sums) > 1 else sums[0]


def linear_w8a8(x_RI: Tensor, codes: Codes, form: Form) -> Tensor:
    """Return x @ weight.T + bias, [R, N] in x's dtype, x quantized row by row; scales act in float32 or wider."""
    quantized_RI, scale_R = quantize_rows(materialized(x_RI))
    sum_RN = integer_product(quantized_RI, codes.quantized_NI, form).to(accumulation_dtype(x_RI.dtype))
    out_RN = sum_RN * scale_R[:, None] * codes.scale_N
    return (out_RN if codes.bias_N is None else out_RN + codes.bias_N).to(x_RI.dtype)
