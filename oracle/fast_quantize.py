"""As `fast`, of what quantizes: storages, and the product of 8-bit integers.

Shapes: as in the reference's files.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..compiled import linear, packing, w8a8
from ..reference.quantize import GroupQuantized, RowQuantized
from ..spec.config import Storage
from .case import Inputs
from .op import Fast, Function


def _quantize(function: Function, inputs: Inputs) -> RowQuantized:
    return RowQuantized(*function(inputs["weight_NI"]))


def _quantize_groups(function: Function, inputs: Inputs) -> GroupQuantized:
    quantized_NI, scale_NG, min_NG = function(inputs["weight_NI"])
    return GroupQuantized(quantized_NI.to(torch.uint8), scale_NG, min_NG)


def _expand(function: Function, inputs: Inputs) -> Tensor:
    quantized: RowQuantized = inputs["quantized"]
    rows, columns = quantized.quantized_NI.shape
    word_BJU = packing.in_blocks(packing.pack_planar(quantized.quantized_NI, bits=8)).contiguous()
    matrix = packing.Matrix(word_BJU.view(torch.float32), quantized.scale_N, None, None, None, rows)
    out: Tensor = function(matrix, Storage.INT8, columns, inputs["dtype"])
    return out


def _expand_groups(function: Function, inputs: Inputs) -> Tensor:
    quantized: GroupQuantized = inputs["quantized"]
    rows, columns = quantized.quantized_NI.shape
    word_BJU = packing.in_blocks(packing.pack_grouped(quantized.quantized_NI.to(torch.int32))).contiguous()
    scale_BGU, min_BGU = packing.in_blocks(quantized.scale_NG), packing.in_blocks(quantized.min_NG)
    matrix = packing.Matrix(word_BJU.view(torch.float32), None, scale_BGU, min_BGU, None, rows)
    out: Tensor = function(matrix, Storage.INT4, columns, inputs["dtype"])
    return out


def _pack(function: Function, inputs: Inputs) -> Tensor:
    weight_NI: Tensor = inputs["weight_NI"]
    matrix: packing.Matrix = function(packing.quantize(weight_NI, inputs["storage"]))
    return linear.expanded(matrix, inputs["storage"], weight_NI.shape[1], inputs["dtype"])


QUANTIZE_ROWS = (Fast(packing.quantize_rows, _quantize),)
DEQUANTIZE_ROWS = (Fast(linear.expanded, _expand),)
QUANTIZE_GROUPS = (Fast(packing.quantize_groups, _quantize_groups),)
DEQUANTIZE_GROUPS = (Fast(linear.expanded, _expand_groups),)
STORED = (Fast(packing.pack, _pack),)
STORED_GROUPS = (Fast(packing.pack, _pack),)


def _codes(quantized_NI: Tensor, form: w8a8.Form) -> Tensor:
    return quantized_NI if form is w8a8.Form.INT8 else quantized_NI.float()


def _integer_product(form: w8a8.Form) -> Callable[[Function, Inputs], Tensor]:
    def adapt(function: Function, inputs: Inputs) -> Tensor:
        quantized_NI = _codes(inputs["quantized_NI"], form).contiguous()
        out: Tensor = function(inputs["quantized_BI"].contiguous(), quantized_NI, form)
        return out

    return adapt


def _linear_w8a8(form: w8a8.Form) -> Callable[[Function, Inputs], Tensor]:
    def adapt(function: Function, inputs: Inputs) -> Tensor:
        weights: RowQuantized = inputs["weights"]
        bias_N = None if inputs["bias_N"] is None else inputs["bias_N"].float()
        codes = w8a8.Codes(_codes(weights.quantized_NI, form), weights.scale_N, bias_N)
        out: Tensor = function(inputs["x"].contiguous(), codes, form)
        return out

    return adapt


_FORMS = dict.fromkeys((w8a8.form_here(torch.device("cpu")), w8a8.Form.FLOAT32))  # this machine's own first
INTEGER_PRODUCT = tuple(Fast(w8a8.integer_product, _integer_product(form)) for form in _FORMS)
LINEAR_W8A8 = tuple(Fast(w8a8.linear_w8a8, _linear_w8a8(form)) for form in _FORMS)
