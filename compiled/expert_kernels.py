"""Compiled kernels of the grouped product, which this calls for a few rows of an expert and for many.

Why it is faster: an expert that got a few rows is multiplied by its words as they are stored, in tiles of 4 rows and of
1, all such experts in one call; expanding it would take as long as multiplying 8 to 16 rows. An expert with more rows
is expanded in one pass over its words, some blocks at a time, which are multiplied while they lie in a cache.
What it relies on: how many rows an expert has is read on the host, so this is part of an operator, and its kernels are
compiled apart from the graphs that call it: once for a storage, with every size dynamic.

Rows 5 to 10 of expert 2 are a tile of 4 and two of 1, since 3 rows take as long as 4:

    tiles of 4   5 6 7 8        tiles of 1   9, 10

Shapes: A choices, P tiles of 4 rows, Q tiles of 1, E experts, N outputs, I inputs, B blocks of U outputs, J words, G
groups.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import Storage
from .chosen import tile_products, with_filling
from .compute import accumulation_dtype, product_dtype
from .linear import PASS_ROWS, multiplies_fast, product
from .packing import GROUP_WORDS, PLACES, ROWS, Matrix, columns_of
from .programs import Pieces

_LEAST_OF_FOUR = 3
"""Rows that are multiplied as a tile of 4."""

MOST_ROWS = {Storage.FLOAT32: 12, Storage.BFLOAT16: 16, Storage.INT8: 16, Storage.INT4: 16}
"""The most rows of an expert that are multiplied by its words as they are stored. In int8 16 rows take 70 % of the time
of expanding 768 x 1024 weights and multiplying."""

_CACHED = 2**21
"""The most weights of an expert in float32 whose words another tile finds in a cache: 8 MiB."""

_EXAMPLE = 6, 48, 200
"""Experts, blocks and words that kernels are compiled on; loops over small sizes would be compiled as serial ones."""

_EXAMPLE_TILES = 24, 20
"""Tiles of 4 rows and of 1 in that example."""

_PIECE = 2**19
"""Weights that are expanded at a time: 2 MiB of float32, which are multiplied while they lie in a cache, and whose
memory is the same each time. A whole matrix of 7168 x 1024 took ten times as long for want of pages."""


class Span(NamedTuple):
    """The rows of one expert, of rows that are sorted by expert."""

    expert: int
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.begin


class Kernels(NamedTuple):
    """The compiled parts of a grouped product."""

    tiles: Callable[..., tuple[Tensor, Tensor]]
    """(x_P4I, expert_P, x_Q1I, expert_Q, word, scale_N, scale_BGU, min_BGU) to products [P, 4, N] and [Q, 1, N]."""
    columns: Callable[..., Tensor]
    """(word_BJU, scale_BU, scale_BGU, min_BGU) to the transposed weights, [I, N] and what fills up both."""


def in_tiles(rows: int, word: Tensor, storage: Storage) -> bool:
    """Return whether an expert with so many rows, and with such words, is multiplied in tiles."""
    return rows <= MOST_ROWS[storage] and (storage is not Storage.FLOAT32 or word.numel() <= _CACHED)


def plain_kernels(storage: Storage, dtype: torch.dtype) -> Kernels:
    """Return the kernels as they are written, for rows of a compute dtype."""
    wide, narrow = accumulation_dtype(dtype), product_dtype(dtype, torch.device("cpu"))

    def tiles(
        x_P4I: Tensor,
        expert_P: Tensor,
        x_Q1I: Tensor,
        expert_Q: Tensor,
        word: Tensor,
        scale_N: Tensor | None,
        scale_BGU: Tensor | None,
        min_BGU: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        experts = word, scale_N, scale_BGU, min_BGU
        out_P4N = tile_products(x_P4I, expert_P, *experts, storage)
        return out_P4N, tile_products(x_Q1I, expert_Q, *experts, storage)

    def columns(word_BJU: Tensor, scale_BU: Tensor | None, scale_BGU: Tensor | None, min_BGU: Tensor | None) -> Tensor:
        return columns_of(word_BJU, scale_BU, scale_BGU, min_BGU, storage, wide).to(narrow)

    return Kernels(tiles, columns)


def kernels_for(storage: Storage, dtype: torch.dtype, *, compiled: bool) -> Kernels:
    """Return the kernels, which are compiled at the first call for a storage, compute dtype and number of threads."""
    return _compiled(storage, dtype, torch.get_num_threads()) if compiled else plain_kernels(storage, dtype)


@functools.cache
def _compiled(storage: Storage, dtype: torch.dtype, threads: int) -> Kernels:
    plain = plain_kernels(storage, dtype)
    experts, blocks, words = _EXAMPLE
    stored: tuple[Tensor | None, ...] = (torch.zeros(experts, blocks, words), None, None, None)
    inputs = words
    if storage is not Storage.FLOAT32:
        inputs = PLACES[storage] * words
        scale_N = torch.zeros(experts, blocks * ROWS) if storage is Storage.INT8 else None
        of_groups = [
            torch.zeros(experts, blocks, words // GROUP_WORDS, ROWS) if storage is Storage.INT4 else None
            for _ in ("scale", "min")  # one tensor for both would be one argument of the kernel
        ]
        stored = torch.zeros(experts, blocks, words, ROWS), scale_N, *of_groups
    pieces = Pieces(f"experts {storage} {dtype}", lambda reason: None)
    of_experts = {"word": (0, 1, 2), "scale_N": (0, 1), "scale_BGU": (0, 1, 2), "min_BGU": (0, 1, 2)}
    of_rows = {"x_P4I": (0, 2), "expert_P": (0,), "x_Q1I": (0, 2), "expert_Q": (0,)}
    tiles = pieces(plain.tiles, {**of_rows, **of_experts})
    of_four, of_one = (torch.arange(count) % experts for count in _EXAMPLE_TILES)
    tiles(
        torch.zeros(len(of_four), PASS_ROWS, inputs, dtype=accumulation_dtype(dtype)),
        of_four,
        torch.zeros(len(of_one), 1, inputs, dtype=accumulation_dtype(dtype)),
        of_one,
        *stored,
    )
    if storage is Storage.FLOAT32:
        return Kernels(tiles, plain.columns)
    columns = pieces(plain.columns, {"word_BJU": (0, 1), "scale_BU": (0,), "scale_BGU": (0, 1), "min_BGU": (0, 1)})
    word, scale_N, scale_BGU, min_BGU = (None if each is None else each[0].clone() for each in stored)
    columns(word, None if scale_N is None else scale_N.view(-1, ROWS), scale_BGU, min_BGU)
    return Kernels(tiles, columns)


def multiply_few(
    x_AI: Tensor,
    spans: Sequence[Span],
    experts: Matrix,
    storage: Storage,
    kernels: Kernels,
    out_AN: Tensor,
) -> None:
    """Write the rows of some experts times their matrices, which are one behind the other."""
    assert experts.word.is_contiguous()
    fours, of_four, ones, of_one = tiles_of(spans)
    rows_P4, rows_Q1 = torch.tensor(fours, dtype=torch.int64), torch.tensor(ones, dtype=torch.int64)
    tiles = (
        (rows_P4.view(-1, PASS_ROWS), torch.tensor(of_four, dtype=torch.int64)),
        (rows_Q1.view(-1, 1), torch.tensor(of_one, dtype=torch.int64)),
    )
    given = [
        part
        for rows_PR, expert_P in tiles
        for part in (with_filling(x_AI[rows_PR].to(accumulation_dtype(x_AI.dtype)), experts.word, storage), expert_P)
    ]
    for (rows_PR, expert_P), out_PRN in zip(tiles, kernels.tiles(*given, *experts[:4]), strict=True):
        out_PRN = out_PRN[..., : experts.outputs]
        if experts.bias_N is not None:
            out_PRN = out_PRN + experts.bias_N[expert_P][:, None]
        out_AN[rows_PR.flatten()] = out_PRN.flatten(0, 1).to(out_AN.dtype)


def tiles_of(spans: Sequence[Span]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the rows of all tiles of 4, the expert of each, and the same of tiles of 1.

    Where there is no fourth row the last is taken again.

    >>> tiles_of([Span(2, 5, 11), Span(3, 11, 14)])
    ([5, 6, 7, 8, 11, 12, 13, 13], [2, 3], [9, 10], [2, 2])
    """
    fours: list[int] = []
    of_four: list[int] = []
    ones: list[int] = []
    of_one: list[int] = []
    for expert, begin, end in spans:
        while end - begin >= _LEAST_OF_FOUR:
            fours += [min(begin + each, end - 1) for each in range(PASS_ROWS)]
            of_four.append(expert)
            begin += PASS_ROWS
        ones += range(begin, end)
        of_one += [expert] * (end - begin)
    return fours, of_four, ones, of_one


def multiply_many(x_RI: Tensor, one: Matrix, storage: Storage, kernels: Kernels, out_RN: Tensor) -> None:
    """Write the rows of one expert times its matrix, some of its outputs at a time where they have to be expanded."""
    inputs, dtype = x_RI.shape[1], product_dtype(x_RI.dtype, x_RI.device)
    x_RI, bias_N = x_RI.to(dtype), None if one.bias_N is None else one.bias_N.to(dtype)
    if storage is Storage.FLOAT32:
        out_RN.copy_(_product_of_rows(x_RI, one.word.to(dtype), bias_N))
        return
    blocks = max(1, _PIECE // (ROWS * inputs))
    for first in range(0, len(one.word), blocks):
        some, outputs = slice(first, first + blocks), slice(first * ROWS, min((first + blocks) * ROWS, one.outputs))
        scale_BU = None if one.scale_N is None else one.scale_N.view(-1, ROWS)[some]
        of_groups = (None if part is None else part[some] for part in (one.scale_BGU, one.min_BGU))
        weight_IN = kernels.columns(one.word[some], scale_BU, *of_groups)[:inputs, : outputs.stop - outputs.start]
        bias = None if bias_N is None else bias_N[outputs]
        out_RN[:, outputs] = _product_of_rows(x_RI, weight_IN.contiguous().t(), bias)


def _product_of_rows(x_RI: Tensor, weight_NI: Tensor, bias_N: Tensor | None) -> Tensor:
    """Return `product`, or for one or two rows what reads weights faster than oneDNN does."""
    if len(x_RI) > 2 or not multiplies_fast(x_RI):
        return product(x_RI, weight_NI, bias_N)
    out_RN = torch.mv(weight_NI, x_RI[0])[None] if len(x_RI) == 1 else (weight_NI @ x_RI.t()).t()
    return out_RN if bias_N is None else out_RN + bias_N
