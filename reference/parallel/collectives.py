"""Collectives over ranks: each takes what every rank hands in, as a list, and returns what every rank gets.

    all_reduce       every rank gets the sum
    reduce_scatter   rank i gets the i-th piece of the sum
    all_gather       every rank gets all pieces, in the order of the ranks
    all_to_all       rank i gets, from every rank j in order, what j has for i
    send             the receiver gets what the sender has

Values are never changed in place. A sum is added in the order of the ranks, in float32 or wider, and rounded once, so
that all ranks get the same bits; a ring starts each piece at another rank, which differs by rounding only. What is sent
is noted in a `Ledger`, under the numbers that the ranks have in the whole job: `ranks[i]` hands in `values[i]`.

With two ranks that hold [1, 2] and [10, 20]:

    >>> values, ranks = [torch.tensor([1, 2]), torch.tensor([10, 20])], [0, 1]
    >>> all_reduce(values, ranks, Ledger())
    [tensor([11, 22]), tensor([11, 22])]
    >>> reduce_scatter(values, ranks, Ledger())
    [tensor([11]), tensor([22])]
    >>> all_gather(values, ranks, Ledger())
    [tensor([ 1,  2, 10, 20]), tensor([ 1,  2, 10, 20])]
    >>> all_to_all([[each[:1], each[1:]] for each in values], ranks, Ledger())
    [[tensor([1]), tensor([10])], [tensor([2]), tensor([20])]]
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .ledger import Collective, Ledger


def all_reduce(values: Sequence[Tensor], ranks: Sequence[int], ledger: Ledger) -> list[Tensor]:
    """Give every rank the sum of what all hand in; shapes and dtypes are equal.

    Three ranks, 4 elements of 4 bytes: pieces of 2, 1 and 1. Each piece travels two hops to be added up and two more to
    be known, so 2 * 2 * 16 bytes are sent in all:

    >>> ledger = Ledger()
    >>> all_reduce([torch.ones(4)] * 3, [0, 1, 2], ledger)[2]
    tensor([3., 3., 3., 3.])
    >>> sum(ledger.bytes.values()), sum(ledger.messages.values())
    (64, 12)
    """
    ledger.call(Collective.ALL_REDUCE, ranks, [value.nbytes for value in values])
    pieces = _piece_sizes(values[0], len(ranks))
    ledger.ring(ranks, pieces, first=0)  # after which rank i holds the sum of piece i + 1
    ledger.ring(ranks, pieces, first=1)
    return [_sum(values)] * len(ranks)


def reduce_scatter(values: Sequence[Tensor], ranks: Sequence[int], ledger: Ledger, *, dim: int = 0) -> list[Tensor]:
    """Give rank i the i-th piece of the sum, cut along a dimension; the first pieces are larger by one if need be."""
    ledger.call(Collective.REDUCE_SCATTER, ranks, [value.nbytes for value in values])
    pieces = list(_sum(values).tensor_split(len(ranks), dim))
    ledger.ring(ranks, [piece.nbytes for piece in pieces], first=-1)  # after which rank i holds the sum of piece i
    return pieces


def all_gather(values: Sequence[Tensor], ranks: Sequence[int], ledger: Ledger, *, dim: int = 0) -> list[Tensor]:
    """Give every rank what all hand in, one after the other along a dimension, in which the sizes may differ."""
    ledger.call(Collective.ALL_GATHER, ranks, [value.nbytes for value in values])
    ledger.ring(ranks, [value.nbytes for value in values], first=0)
    return [torch.cat(list(values), dim)] * len(ranks)


def all_to_all(values: Sequence[Sequence[Tensor]], ranks: Sequence[int], ledger: Ledger) -> list[list[Tensor]]:
    """Transpose: `values[j][i]` is what rank j has for rank i; it becomes entry j of what i gets. Sizes may differ.

    Rank 0 has nothing for rank 1, and 3 elements of 4 bytes for itself, which are not sent:

    >>> ledger = Ledger()
    >>> got = all_to_all([[torch.zeros(3), torch.zeros(0)], [torch.ones(2), torch.ones(1)]], [0, 1], ledger)
    >>> got[0], ledger.bytes
    ([tensor([0., 0., 0.]), tensor([1., 1.])], Counter({(1, 0): 8}))
    """
    ledger.call(Collective.ALL_TO_ALL, ranks, [sum(value.nbytes for value in row) for row in values])
    for source, row in zip(ranks, values, strict=True):
        for target, value in zip(ranks, row, strict=True):
            ledger.message(source, target, value.nbytes)
    return [list(column) for column in zip(*values, strict=True)]


def send(value: Tensor, source: int, target: int, ledger: Ledger) -> Tensor:
    """Give the target what the source has."""
    ledger.call(Collective.SEND, (source, target), (value.nbytes, 0))
    ledger.message(source, target, value.nbytes)
    return value


def _sum(values: Sequence[Tensor]) -> Tensor:
    dtype = values[0].dtype
    total = values[0].to(torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype)
    for value in values[1:]:
        total = total + value
    return total.to(dtype)


def _piece_sizes(value: Tensor, ranks: int) -> list[int]:
    return [piece.nbytes for piece in value.flatten().tensor_split(ranks)]
