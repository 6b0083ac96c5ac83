"""Experts that are fetched once tokens have chosen them, where a model's experts do not lie in memory all.

Why a layer stays one graph: what stops it, until the chosen experts are in memory, is an operator of its own. For few
tokens it returns where they lie, and the product that follows reads them there (`chosen.chosen_product`). For many
tokens it multiplies by one expert after the other, in whatever order they arrive: every row belongs to one expert, so
the order of experts changes no sum.

Example: experts 5 and 2 were chosen, and lie in slots 0 and 3 of the memory for experts. The operator returns 0 and 3,
and words 0 and 3 of that memory are multiplied.

Shapes: A choices sorted by expert, T tokens, K = top_k, M hidden, E experts, N outputs, I inputs.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..spec.config import Storage
from .experts import multiplied
from .packing import Matrix

UP, DOWN = 0, 1
"""The matrices of an expert."""


class Fetcher(Protocol):
    """The part of an offloading path that brings one layer's experts into memory."""

    def slots(self, expert_TK: Tensor, x_TM: Tensor) -> Tensor:
        """Return where each chosen expert lies, in memory from now until the next call; `x_TM` chose them."""
        ...

    def matrices(self, experts: Sequence[int], part: int) -> Iterator[tuple[int, Matrix]]:
        """Yield each expert with its matrix, in any order; a matrix is there until the next is asked for."""
        ...


_fetchers: "weakref.WeakValueDictionary[int, Fetcher]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(fetcher: Fetcher) -> Tensor:
    """Return the number by which graphs know a fetcher, int64 [1], as long as somebody else holds it."""
    number = next(_numbers)
    _fetchers[number] = fetcher
    return torch.tensor([number])


def fetched_slots(expert_TK: Tensor, x_TM: Tensor, fetcher_1: Tensor) -> Tensor:
    """Bring the chosen experts into memory; returns the slot of each choice, [T, K]."""
    slot_TK: Tensor = torch.ops.twinfer.fetched_slots(expert_TK, x_TM, fetcher_1)
    return slot_TK


def fetched_product(
    x_AI: Tensor, rows_E: Tensor, fetcher_1: Tensor, part: int, outputs: int, storage: Storage
) -> Tensor:
    """Return rows sorted by expert, each times a matrix of its own expert, [A, N] in x's dtype."""
    compiled = torch.compiler.is_compiling()
    out_AN: Tensor = torch.ops.twinfer.fetched_product(x_AI, rows_E, fetcher_1, part, outputs, storage.value, compiled)
    return out_AN


@torch.library.custom_op("twinfer::fetched_slots", mutates_args=())
def _fetched_slots(expert_TK: Tensor, x_TM: Tensor, fetcher_1: Tensor) -> Tensor:
    return _fetchers[int(fetcher_1)].slots(expert_TK, x_TM)


@_fetched_slots.register_fake
def _(expert_TK: Tensor, x_TM: Tensor, fetcher_1: Tensor) -> Tensor:
    return expert_TK.new_empty(expert_TK.shape)


@torch.library.custom_op("twinfer::fetched_product", mutates_args=())
def _fetched_product(
    x_AI: Tensor, rows_E: Tensor, fetcher_1: Tensor, part: int, outputs: int, storage: str, compiled: bool
) -> Tensor:
    chosen = [expert for expert, rows in enumerate(rows_E.tolist()) if rows]
    matrices = _fetchers[int(fetcher_1)].matrices(chosen, part)
    return multiplied(x_AI, rows_E, matrices, outputs, Storage(storage), compiled)


@_fetched_product.register_fake
def _(x_AI: Tensor, rows_E: Tensor, fetcher_1: Tensor, part: int, outputs: int, storage: str, compiled: bool) -> Tensor:
    return x_AI.new_empty(x_AI.shape[0], outputs)
