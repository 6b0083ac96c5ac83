"""Products with stored matrices: for a few rows straight from the packed words, for many through float32.

Why it is faster: a few rows are bound by reading the weights, so these are read once, as they are packed, and never
written out; a vector holds 8 or 16 outputs, so an activation is one number that multiplies all of them, and no sum
goes across a vector. What Inductor then compiles is one loop over blocks of outputs, an accumulator for each row.
A processor fetches ahead for several streams of addresses at a time and gets more from memory by several than by one,
so a matrix of which little is computed is read as up to 4 parts side by side (`_streams`). With many rows the
arithmetic dominates, so the weights are expanded once, one matrix at a time, for a matrix product.

Which form, decided by storage, program and sizes, so that it is settled when a program is compiled:

    a row of float32            the compiled loop over each output's own row
    2 to 4 rows of float32      the same loop for all rows at once; of long rows, over as many inputs at a time as fit
                                the first caches; if no vector divides these, `product`
    a decode step, packed       the compiled loop over packed words, for 1 or 4 rows at a time (`passes`)
    more rows of float32        `product` on the weights as they lie
    a prefill, packed           expanded to float32, or to 16 bits where these are multiplied, then `product`

`product` is oneDNN's matrix product on a CPU with AVX-512, on the weights as they lie: where that was measured (MKL not
using AVX-512) it was more than twice as fast as `F.linear` at 512 rows, and within a tenth of oneDNN on weights in its
own packing. Elsewhere it is `F.linear`, which was as fast as oneDNN with AVX2; and so it is for dtypes but float32.

Shapes: R or T rows, N outputs, I inputs, B blocks of U outputs, J words in C places, G groups of W words. B and N
of a part of the matrix are that part's.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..spec.config import Storage
from .compute import ONEDNN_DTYPE, accumulation_dtype, product_dtype
from .packing import (
    GROUP_WORDS,
    PLACES,
    RAISED,
    ROWS,
    Matrix,
    columns_of,
    lowering,
    place_values,
    raised_codes,
    weights_of_rows,
)

PASS_ROWS = 4
"""As many rows share a pass over the weights: with them it computes about as long as it reads."""

_MANY_REGISTERS = ROWS == 16
"""AVX-512 has 32 registers of 16 numbers, AVX2 16 of 8."""

_SHORT_INT4 = 2048
"""Inputs up to which, with registers of 16 numbers, a matrix of int4 gains nothing by being read as 2 parts; compiling
these takes longer."""

_MANY_INPUTS = 8192
"""Numbers of several rows that are read anew for each output: 32 KiB, of a first cache of 32 to 48."""

_MOST_INPUTS = 16384
"""As many of them are multiplied at a time."""


def passes(rows: int, storage: Storage) -> list[list[int]]:
    """The rows of each pass over the weights: one alone, or 4; where they run out the last is taken again.

    Of float32 more than 4 are one pass, which is `linear_prefill`'s.

    >>> passes(1, Storage.INT8), passes(6, Storage.INT8), passes(6, Storage.FLOAT32)
    ([[0]], [[0, 1, 2, 3], [4, 5, 5, 5]], [[0, 1, 2, 3, 4, 5]])
    """
    if rows == 1 or (storage is Storage.FLOAT32 and rows > PASS_ROWS):
        return [list(range(rows))]
    return [[min(first + each, rows - 1) for each in range(PASS_ROWS)] for first in range(0, rows, PASS_ROWS)]


def linear_decode(x_RI: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    """Return x @ weight.T + bias for a few rows, [R, N] in x's dtype, the weights read once and never expanded.

    R is small and fixed in a graph (`passes`): every row's sums are written out in it.
    """
    return _linear_decode(x_RI.to(accumulation_dtype(x_RI.dtype)), weights, storage).to(x_RI.dtype)


def _linear_decode(x_RI: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    if storage is Storage.FLOAT32:
        x_RI = materialized(x_RI)
        rows, inputs = x_RI.shape
        if rows == 1 or rows * inputs < _MANY_INPUTS:
            dots_RN = _dots(x_RI, weights.word)
        elif inputs % ROWS == 0:
            dots_RN = _long_dots(x_RI, weights.word)
        else:
            return _product_in(x_RI.dtype, x_RI, weights.word, weights.bias_N)
        return dots_RN if weights.bias_N is None else dots_RN + weights.bias_N
    sums = _grouped_sums(x_RI, weights) if storage is Storage.INT4 else _planar_sums(x_RI, weights, storage)
    for part_BU, apply in ((_in_blocks(weights.scale_N), torch.mul), (_in_blocks(weights.bias_N), torch.add)):
        if part_BU is not None:
            sums = [apply(sum_BU, part_BU) for sum_BU in sums]
    return torch.stack(sums).flatten(1)[:, : weights.outputs]


def _streams(x_RI: Tensor, storage: Storage, length: int) -> int:
    """As how many parts a matrix of so many rows or blocks is read at once: that many loops as one.

    A row computes so little that 4 pay, but of int4 it computes so much that only 2 do. With more rows registers run
    short: where there are many 2 pay for bfloat16 and int8, and for float32 4 do, but only of long rows.
    """
    rows, inputs = x_RI.shape
    if storage is Storage.INT4:
        most = 2 if rows == 1 and (inputs > _SHORT_INT4 or not _MANY_REGISTERS) else 1
    elif rows == 1:
        most = 4
    elif storage is Storage.FLOAT32:
        most = 4 if x_RI.numel() >= _MANY_INPUTS else 1
    else:
        most = 2 if _MANY_REGISTERS else 1
    return math.gcd(most, length)


def _dots(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """The products with each output's row, [R, N]."""
    parts = weight_NI.chunk(_streams(x_RI, Storage.FLOAT32, weight_NI.shape[0]))
    return torch.stack([_joined([(weight_NI * x_I).sum(-1) for weight_NI in parts]) for x_I in x_RI.unbind(0)])


def _long_dots(x_RI: Tensor, weight_NI: Tensor) -> Tensor:
    """As `_dots`, piece by piece of the inputs, which lie vector by vector: those of all rows side by side.

    Otherwise rows of 4096 inputs, and the matrix's parts, would all lie in the same few places of a cache.
    """
    rows, inputs = x_RI.shape
    pieces = -(-x_RI.numel() // _MOST_INPUTS)
    length = -(-inputs // (pieces * ROWS))
    x_RVU, weight_NVU = x_RI.view(rows, -1, ROWS), weight_NI.view(len(weight_NI), -1, ROWS)
    sums = []
    for first in range(0, inputs // ROWS, length):
        x_VRU = materialized(x_RVU[:, first : first + length].transpose(0, 1).contiguous())
        parts = weight_NVU[:, first : first + length].chunk(_streams(x_RI, Storage.FLOAT32, len(weight_NI)))
        sums.append([_joined([(part_NVU * x_VU).sum((1, 2)) for part_NVU in parts]) for x_VU in x_VRU.unbind(1)])
    return torch.stack([_added(list(of_row)) for of_row in zip(*sums, strict=True)])


def _planar_sums(x_RI: Tensor, weights: Matrix, storage: Storage) -> list[Tensor]:
    """For each row the sums over all words, [B, U]; of int8 the codes' sums, not yet scaled."""
    places, (blocks, words, _) = PLACES[storage], weights.word.shape
    x_RI = materialized(functional.pad(x_RI, (0, places * words - x_RI.shape[1])))
    x_JRC = x_RI.view(-1, places, words).permute(2, 0, 1)
    if len(x_RI) > 1:  # side by side what a word is multiplied with
        x_JRC = materialized(x_JRC.contiguous())
    parts = [
        [place_values(word_BJU, storage, place, x_RI.dtype) for place in range(places)]
        for word_BJU in weights.word.chunk(_streams(x_RI, storage, blocks))
    ]
    return [
        _joined([_added([value * x_J1 for value, x_J1 in zip(part, x_J1s, strict=True)]).sum(1) for part in parts])
        for x_J1s in (x_JC1.unbind(1) for x_JC1 in x_JRC[..., None].unbind(1))
    ]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _grouped_sums(x_RI: Tensor, weights: Matrix) -> list[Tensor]:
    """As `_planar_sums`, of weights: a group's step multiplies the sum over its codes, its low that of its x.

    Codes are taken raised, as they stand in the words, and activations are lowered for it (`raised_codes`).
    """
    assert weights.scale_BGU is not None
    assert weights.min_BGU is not None
    (blocks, words, _), places = weights.word.shape, PLACES[Storage.INT4]
    x_RI = materialized(functional.pad(x_RI, (0, places * words - x_RI.shape[1])))
    x_RGCW = x_RI.view(-1, words // GROUP_WORDS, places, GROUP_WORDS)
    sum_JR = materialized((_added(list(x_RGCW.unbind(2))) * RAISED).flatten(1).t().contiguous())
    x_JRC = materialized((x_RGCW.permute(1, 3, 0, 2).flatten(0, 1) * lowering(x_RI.device)).contiguous())
    streams = _streams(x_RI, Storage.INT4, blocks)
    parts = [
        ([raised_codes(word_BJU, place, x_RI.dtype) for place in range(places)], _of_words(step), _of_words(low))
        for word_BJU, step, low in zip(
            *(each.chunk(streams) for each in (weights.word, weights.scale_BGU, weights.min_BGU)), strict=True
        )
    ]
    sums = []
    for sum_J1, x_JC1 in zip(sum_JR[..., None].unbind(1), x_JRC[..., None].unbind(1), strict=True):
        of_parts = []
        for values, step_BJU, low_BJU in parts:
            of_codes = _added([value * x_J1 for value, x_J1 in zip(values, x_JC1.unbind(1), strict=True)])
            of_parts.append((of_codes * step_BJU + sum_J1 * low_BJU).sum(1))
        sums.append(_joined(of_parts) / RAISED)
    return sums


def _of_words(of_groups_BGU: Tensor) -> Tensor:
    """For each word what its group has, [B, J, U]."""
    return of_groups_BGU[:, :, None].expand(-1, -1, GROUP_WORDS, -1).flatten(1, 2)


def _in_blocks(of_outputs_N: Tensor | None) -> Tensor | None:
    if of_outputs_N is None:
        return None
    return functional.pad(of_outputs_N, (0, -of_outputs_N.shape[0] % ROWS)).view(-1, ROWS)


def _added(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def linear_prefill(x_TI: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    """Return x @ weight.T + bias for many rows, [T, N] in x's dtype."""
    dtype = product_dtype(x_TI.dtype, x_TI.device)
    weight_NI = expanded(weights, storage, x_TI.shape[1], dtype)
    return _product_in(dtype, x_TI, weight_NI, weights.bias_N).to(x_TI.dtype)


def _product_in(dtype: torch.dtype, x_TI: Tensor, weight_NI: Tensor, bias_N: Tensor | None) -> Tensor:
    return product(x_TI.to(dtype), weight_NI.to(dtype), None if bias_N is None else bias_N.to(dtype))


def expanded(weights: Matrix, storage: Storage, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix [N, I]; if it was packed with the outputs side by side, as a block of words has them."""
    if storage is Storage.FLOAT32:
        return weights.word.to(dtype)
    scale_BU = _in_blocks(weights.scale_N)
    wide = accumulation_dtype(dtype)
    weight_IN = columns_of(weights.word, scale_BU, weights.scale_BGU, weights.min_BGU, storage, wide)
    return weight_IN[:inputs, : weights.outputs].to(dtype).contiguous().t()


def lookup(token_T: Tensor, table: Matrix, storage: Storage, hidden: int, dtype: torch.dtype) -> Tensor:
    """Return rows of the stored token table, [T, M] in float32 or float64.

    What is stored of them is copied out before anything is computed. In one loop with the choice of rows, which
    branches more often for a table of dynamic size, gcc rounds int4's code * scale + min once or twice, by how many
    branches lie between product and sum. So the same rows out of a smaller table would get other bits.
    """
    if storage is Storage.FLOAT32:
        return materialized(table.word[token_T].contiguous()).to(dtype)
    block_T, row_T = token_T // ROWS, token_T % ROWS
    word_TJ, scale_TG, min_TG = (
        None if each is None else materialized(each[block_T, :, row_T].contiguous())
        for each in (table.word, table.scale_BGU, table.min_BGU)
    )
    scale_T = None if table.scale_N is None else materialized(table.scale_N[token_T])
    assert word_TJ is not None
    return weights_of_rows(word_TJ, scale_T, scale_TG, min_TG, storage, hidden, dtype)


_has_onednn: Callable[[], bool] = torch.backends.mkldnn.is_available  # untyped in torch, as is the next but one
_onednn: Callable[..., Tensor] | None = (
    torch.ops.mkldnn._linear_pointwise.default if _has_onednn() and _MANY_REGISTERS else None
)
_Library: Callable[..., Any] = torch.library.Library


def multiplies_fast(x: Tensor) -> bool:
    """Return whether `product` is oneDNN's operator for such a tensor."""
    return x.device.type == "cpu" and x.dtype is ONEDNN_DTYPE and _onednn is not None


def product(x_TI: Tensor, weight_NI: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias by the fastest matrix product of torch, [T, N]; all are of one dtype."""
    if not multiplies_fast(x_TI):
        return functional.linear(x_TI, weight_NI, bias_N)
    if not torch.compiler.is_compiling():
        return _product(x_TI, weight_NI, bias_N)
    out_TN: Tensor = torch.ops.twinfer.product(x_TI, weight_NI, bias_N)
    return out_TN


# In graphs an operator of its own: Inductor takes oneDNN's for weights that are constants of the graph, no others.
_library = _Library("twinfer", "FRAGMENT")
_library.define("product(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _product(x_TI: Tensor, weight_NI: Tensor, bias_N: Tensor | None) -> Tensor:
    assert _onednn is not None
    return _onednn(x_TI, weight_NI, bias_N, "none", [], "")


def _product_shape(x_TI: Tensor, weight_NI: Tensor, bias_N: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_NI.shape[0])


_library.impl("product", _product, "CPU")
_library._register_fake("product", _product_shape)


def materialized(x: Tensor) -> Tensor:
    """Return the same tensor, which Inductor is made to finish before its consumer runs.

    Otherwise it would fuse what made x (a norm, an activation) into the product and repeat it for every output row. No
    offset is given, so part of another tensor is read at its own.
    """
    assert x.is_contiguous()
    return x.as_strided(x.shape, x.stride())
