"""How the twinfer form keeps a tensor in a file, by storage, such that reading it back changes nothing.

Who writes brings the quantizers of a path (`Quantizers`): quantizing is the paths' work, and is not defined here again.

A path rounds matrices to its storage when it reads them. So the form must give back numbers whose rounding is what
the original's was. In float32 and bfloat16 the rounded numbers do. In int8 the codes times the scale nearly always do:
the scale is the row's largest magnitude / 127, and in float32 127 times it, divided by 127 again, is the same number
(all 2 ** 23 of them were tried), but not where it is denormal. So the form keeps the largest magnitude itself, the
row's peak, which is what codes of the largest magnitude become:

    scale = peak / 127      weight = sign(code) * peak where |code| is the row's largest, else code * scale

In int4 it keeps the least and the largest weight of each group (`group_encoding` says why).

Shapes: N rows, I columns, G groups of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.config import INT4_GROUP, Storage
from ...spec.errors import WeightError
from ...spec.shapes import Shapes, is_buffer, is_matrix
from ...spec.shard import Slices, index_of
from .group_encoding import dequantized_groups, encoded_groups

Quantize = Callable[[Tensor], Tensor]
"""Quantized values of a float32 matrix [N, I], integers of its shape."""


class Quantizers(NamedTuple):
    """How a path quantizes a matrix."""

    rows: Quantize
    """int8: each row by its absmax, values of -127 .. 127."""
    groups: Quantize
    """int4: each group of a row between its least and its largest weight, values of 0 .. 15."""


ABSMAX = ".absmax_N"
"""Ends the name of the tensor of peaks that stands beside one of int8 codes."""
MIN, MAX = ".min_NG", ".max_NG"
"""End the names of the tensors that stand beside one of int4 codes: the least and largest weight of each group."""


def layout(shapes: Shapes, storage: Storage) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a file must hold for weights of these shapes: each tensor's dtype, as safetensors names it, and shape.

    >>> layout({"up.weight_NI": (3, 5), "up.bias_N": (3,)}, Storage.INT8)
    {'up.weight_NI': ('I8', (3, 5)), 'up.weight_NI.absmax_N': ('F32', (3,)), 'up.bias_N': ('F32', (3,))}
    """
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if is_matrix(name):
            expected |= _matrix_layout(name, shape[:-1], shape[-1], storage)
        else:
            expected[name] = "F64" if is_buffer(name) else "F32", shape
    return expected


def _matrix_layout(
    name: str, rows: tuple[int, ...], inputs: int, storage: Storage
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Lay out a matrix, or one for each expert: rows are (N,) or (E, N)."""
    match storage:
        case Storage.FLOAT32:
            return {name: ("F32", (*rows, inputs))}
        case Storage.BFLOAT16:
            return {name: ("BF16", (*rows, inputs))}
        case Storage.INT8:
            return {name: ("I8", (*rows, inputs)), name + ABSMAX: ("F32", rows)}
        case Storage.INT4:
            of_groups = "F32", (*rows, -(-inputs // INT4_GROUP))
            return {name: ("U8", (*rows, -(-inputs // 2))), name + MIN: of_groups, name + MAX: of_groups}


def layout_slices(slices: Slices, storage: Storage) -> dict[str, tuple[slice, ...]]:
    """Say what a rank reads of each tensor of a file: quantized values, and their scales, are the same on any rank.

    Scales belong to whole rows or groups, so columns take the scales of their rows along. Columns 128 to 191 in int4
    are bytes 64 to 95, and group 2:

    >>> layout_slices({"down.weight_NI": (None, slice(128, 192))}, Storage.INT4)["down.weight_NI"]
    (slice(None, None, None), slice(64, 96, None))
    """
    cuts: dict[str, tuple[slice, ...]] = {}
    for name, each in slices.items():
        cuts[name] = index_of(each)
        if is_matrix(name) and storage is Storage.INT8:
            cuts[name + ABSMAX] = cuts[name][:-1]
        elif is_matrix(name) and storage is Storage.INT4:
            *rows, columns = cuts[name]
            cuts[name] = *rows, _coarser(columns, 2)
            cuts[name + MIN] = cuts[name + MAX] = *rows, _coarser(columns, INT4_GROUP)
    return cuts


def _coarser(columns: slice, size: int) -> slice:
    """Turn columns into bytes or groups that hold that many columns each."""
    return slice(None) if columns.stop is None else slice(columns.start // size, -(-columns.stop // size))


def encode(name: str, tensor: Tensor, storage: Storage, quantizers: Quantizers) -> dict[str, Tensor]:
    """Return what a file holds for the weight of that name. Raises `WeightError` for what int8 and int4 cannot keep."""
    if is_buffer(name):
        return {name: tensor}
    if not is_matrix(name):
        return {name: tensor.to(torch.float32)}
    match storage:
        case Storage.FLOAT32:
            return {name: tensor.to(torch.float32)}
        case Storage.BFLOAT16:
            return {name: tensor.to(torch.bfloat16)}
        case Storage.INT8:
            of_rows = encoded_rows(tensor.to(torch.float32).flatten(0, -2), quantizers.rows, name)
            return _stacked(dict(zip((name, name + ABSMAX), of_rows, strict=True)), tensor.shape[:-1])
        case Storage.INT4:
            of_groups = encoded_groups(tensor.to(torch.float32).flatten(0, -2), quantizers.groups, name)
            return _stacked(dict(zip((name, name + MIN, name + MAX), of_groups, strict=True)), tensor.shape[:-1])


def _stacked(encoded: dict[str, Tensor], rows: torch.Size) -> dict[str, Tensor]:
    """Return what was encoded row by row with the rows' own dimensions: those of an expert may be stacked."""
    return {name: tensor.view(*rows, *tensor.shape[1:]) for name, tensor in encoded.items()}


def decode(found: dict[str, Tensor], shapes: Shapes, storage: Storage) -> dict[str, Tensor]:
    """The weights that a file's tensors stand for: as they are, or as float32 where they are codes."""
    weights = {}
    for name, shape in shapes.items():
        if is_matrix(name) and storage is Storage.INT8:
            of_rows = dequantized(found[name].flatten(0, -2), found[name + ABSMAX].flatten())
            weights[name] = of_rows.view(shape)
        elif is_matrix(name) and storage is Storage.INT4:
            byte_NW, min_NG, max_NG = (found[each].flatten(0, -2) for each in (name, name + MIN, name + MAX))
            weights[name] = dequantized_groups(byte_NW, min_NG, max_NG, shape[-1]).view(shape)
        else:
            weights[name] = found[name]
    return weights


def encoded_rows(weight_NI: Tensor, quantize: Quantize, name: str = "weight_NI") -> tuple[Tensor, Tensor]:
    """Return int8 values and the absmax of each row. Raises `WeightError` where a row holds something not finite."""
    absmax_N = weight_NI.abs().amax(-1)
    if not bool(absmax_N.isfinite().all()):
        row = int((~absmax_N.isfinite()).nonzero()[0])
        raise WeightError(f"{name} holds {float(absmax_N[row])} in row {row}; int8 keeps finite numbers only")
    return quantize(weight_NI).to(torch.int8), absmax_N


def dequantized(quantized_NI: Tensor, absmax_N: Tensor) -> Tensor:
    """Return float32 numbers that quantize to these very values and absmaxes, of whole rows or of some columns.

    >>> dequantized(torch.tensor([[127, -2, 2]], dtype=torch.int8), torch.tensor([254.0]))  # the scale is 2
    tensor([[254.,  -4.,   4.]])
    """
    size_NI = quantized_NI.to(torch.int32).abs()
    scale_N = absmax_N / 127
    largest_N1 = torch.where(scale_N > 0, absmax_N / scale_N, 0.0).round().clamp_max(127)[:, None]  # of the whole row
    weight_NI = quantized_NI.to(torch.float32) * scale_N[:, None]
    at_peak_NI = (size_NI == largest_N1) & (largest_N1 > 0)
    return torch.where(at_peak_NI, torch.copysign(absmax_N[:, None].expand(quantized_NI.shape), weight_NI), weight_NI)
