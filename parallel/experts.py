"""Experts on many ranks: each token is routed where it is, and its rows travel to the ranks that hold its experts.

    dispatch     all-to-all: rows sorted by expert, how many there are ahead of them
    gather       all-gather among ranks that hold other slices of the same experts
    compute      the grouped product of the compiled path, on this rank's slice of its experts
    reduce       all-reduce of those ranks; each keeps its own rows
    return       all-to-all back

Why it is faster: rows of one expert are multiplied together, whichever rank they came from, so an expert's weights are
read once a layer. How many rows there are is known only when they arrive, so the exchange runs between compiled pieces;
what arrives is multiplied by one of two, each for any number of rows. Few rows read the words of their experts where
these lie, without the operator that sorts more rows by expert and takes 0.2 ms a product to say what goes where.

Shapes: T tokens, K = top_k, A = T * K choices, E experts (of a rank, its own), N rows, M hidden, P ranks that exchange,
S slices, Q peers whose rows follow each other.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled.expert_kernels import in_tiles
from ..compiled.experts import grouped_product, sort_by_expert
from ..compiled.fetching import DOWN, UP, fetched_product, fetched_slots
from ..compiled.linear import PASS_ROWS
from ..compiled.mlp import inner
from ..compiled.moe import Mlp, Moe, one_by_one
from ..compiled.steps import Piece, eager
from ..spec.config import Storage
from ..spec.moe import MoeConfig
from ..spec.parallel import Exchange
from .exchange import Route, places_of, run_bounds, swap
from .groups import Groups
from .wire import Wire

_FEW_EXAMPLE, _MANY_EXAMPLE = 24, 160
"""Rows that pieces are compiled on; loops over fewer would be compiled as serial ones."""


class ExpertPieces(NamedTuple):
    """Each is (rows [N, M], how many of each peer are for each expert, weights) -> what their experts make of them."""

    few: Callable[[Tensor, Tensor, Mlp], Tensor]
    many: Callable[[Tensor, Tensor, Mlp], Tensor]
    here: Callable[[Tensor, Tensor, Mlp], Tensor]
    """(rows, the slot of each, weights), for `PASS_ROWS` rows whose experts were fetched."""
    fetched: Callable[[Tensor, Tensor, Mlp, Tensor], Tensor]
    """(rows, counts, weights, the fetcher), for more rows; it fetches one expert after the other."""
    are_few: Callable[[int, Mlp], bool]
    """(N, weights) -> whether `few` is for so many rows."""


def expert_pieces(config: MoeConfig, storage: Storage, piece: Piece) -> ExpertPieces:
    """Return the pieces of a rank's slice of its experts."""

    def few(row_NM: Tensor, count_QE: Tensor, experts: Mlp) -> Tensor:
        return one_by_one(row_NM, _expert_of(len(row_NM), count_QE), experts, config.expert, storage)

    def many(row_NM: Tensor, count_QE: Tensor, experts: Mlp) -> Tensor:
        order = sort_by_expert(_expert_of(len(row_NM), count_QE)[:, None], count_QE.shape[1])
        inner_NF = inner(grouped_product(row_NM[order.choice_A], order.rows_E, experts.up, storage), config.expert)
        return grouped_product(inner_NF, order.rows_E, experts.down, storage)[order.place_A]

    def here(row_NM: Tensor, slot_N: Tensor, experts: Mlp) -> Tensor:
        return one_by_one(row_NM, slot_N, experts, config.expert, storage)

    def fetched(row_NM: Tensor, count_QE: Tensor, experts: Mlp, fetcher_1: Tensor) -> Tensor:
        up, down = experts
        order = sort_by_expert(_expert_of(len(row_NM), count_QE)[:, None], count_QE.shape[1])
        given = order.rows_E, fetcher_1
        inner_NF = inner(fetched_product(row_NM[order.choice_A], *given, UP, up.outputs, storage), config.expert)
        return fetched_product(inner_NF, *given, DOWN, down.outputs, storage)[order.place_A]

    def are_few(rows: int, experts: Mlp) -> bool:
        """Compiled, they are what the operator multiplies in tiles if all are of one expert; else words are copied."""
        in_place = piece is not eager and all(in_tiles(rows, each.word[0], storage) for each in experts)
        return rows <= PASS_ROWS or in_place

    rows = {"row_NM": (0,)}
    return ExpertPieces(piece(few, rows), piece(many, rows), piece(here, {}), piece(fetched, rows), are_few)


def warm_up(weights: Moe, config: MoeConfig, pieces: ExpertPieces, example_M: Tensor, groups: Groups) -> None:
    """Compile the pieces on an example, as no rank sends any rows."""
    peers, own = len(places_of(groups)) * len(groups.slices), config.router.experts // groups.parallel.expert
    count_QE = torch.zeros(peers, own, dtype=torch.int64, device=example_M.device)
    if weights.fetcher_1 is not None:
        for rows in (PASS_ROWS, _MANY_EXAMPLE):
            count_QE[0, 0] = rows
            multiplied(example_M.repeat(rows, 1), count_QE, weights, pieces)
        return
    for rows, multiply in ((_FEW_EXAMPLE, pieces.few), (_MANY_EXAMPLE, pieces.many)):
        count_QE[0, 0] = rows
        multiply(example_M.repeat(rows, 1), count_QE, weights.experts)


def _expert_of(rows: int, count_QE: Tensor) -> Tensor:
    """Return the expert of each row, where peer q has sent count[q][e] for each expert e, one after the other.

    >>> _expert_of(3, torch.tensor([[1, 0], [0, 2]]))
    tensor([0, 1, 1])
    """
    end_A = count_QE.flatten().cumsum(0)
    row_N = torch.arange(rows, device=count_QE.device)
    return (row_N[:, None] >= end_A).sum(1) % count_QE.shape[1]


def serve(x_TM: Tensor, expert_TK: Tensor, weights: Moe, config: MoeConfig, pieces: ExpertPieces, wire: Wire) -> Tensor:
    """Return what its experts make of each token, [T, K, M]; `weights` and `config` are this rank's share.

    While the wire is muted nothing is computed: no rank knows what would arrive.
    """
    if wire.is_muted:
        return x_TM.new_zeros(*expert_TK.shape, x_TM.shape[1])
    groups, total = wire.groups, config.router.experts
    own = total // groups.parallel.expert
    order = sort_by_expert(expert_TK, total)
    rows_E: list[int] = order.rows_E.tolist()
    x_AM = x_TM[order.choice_A // expert_TK.shape[1]]
    bounds_E = run_bounds(rows_E)
    held_P = [range(place * own, (place + 1) * own) for place in places_of(groups)]
    going = [expert for held in held_P for expert in held]
    told_PE = torch.tensor([rows_E[expert] for expert in going], dtype=torch.int64).view(len(held_P), own)
    even = Route([1] * len(held_P), [1] * len(held_P))
    count_PE = swap(told_PE, even, wire)
    route = Route(told_PE.sum(1).tolist(), count_PE.sum(1).tolist())
    arrived_NM = swap(torch.cat([x_AM[bounds_E[expert]] for expert in going]), route, wire)
    served_NM = _serve_slices(arrived_NM, count_PE, weights, pieces, wire)
    returned_NM = swap(served_NM, route.back, wire)
    if groups.parallel.exchange is Exchange.COORDINATED:
        returned_NM = _gathered(returned_NM, rows_E, own, wire)
    return returned_NM[order.place_A].view(*expert_TK.shape, x_TM.shape[1])


def _serve_slices(row_NM: Tensor, count_PE: Tensor, weights: Moe, pieces: ExpertPieces, wire: Wire) -> Tensor:
    """Return what this rank's experts make of the rows that arrived, complete over all slices of them."""
    slices = wire.groups.slices
    if len(slices) == 1:
        return multiplied(row_NM, count_PE, weights, pieces)
    count_SPE = wire.all_gather_rows(count_PE, [len(count_PE)] * len(slices), slices).view(len(slices), *count_PE.shape)
    lengths: list[int] = count_SPE.sum((1, 2)).tolist()
    all_NM = wire.all_gather_rows(row_NM, lengths, slices)
    out_NM = multiplied(all_NM, count_SPE.flatten(0, 1), weights, pieces).contiguous()  # few rows of int8 may not be
    return torch.split(wire.all_reduce(out_NM, slices), lengths)[slices.place]


def multiplied(row_NM: Tensor, count_QE: Tensor, weights: Moe, pieces: ExpertPieces) -> Tensor:
    """Feed rows through this rank's slice of their experts: of peer q there are count[q][e] for each expert e."""
    rows = len(row_NM)
    if rows == 0:
        return row_NM
    if weights.fetcher_1 is None:
        multiply = pieces.few if pieces.are_few(rows, weights.experts) else pieces.many
        return multiply(row_NM, count_QE, weights.experts)
    if rows > PASS_ROWS:
        return pieces.fetched(row_NM, count_QE, weights.experts, weights.fetcher_1)
    slot_N1 = fetched_slots(_expert_of(rows, count_QE)[:, None], row_NM, weights.fetcher_1)
    row_PM, slot_P = filled_up(row_NM, PASS_ROWS), filled_up(slot_N1.flatten(), PASS_ROWS)
    return pieces.here(row_PM, slot_P, weights.experts)[:rows]


def filled_up(row_NKM: Tensor, count: int) -> Tensor:
    """Return the rows, and copies of the last one up to so many."""
    if len(row_NKM) == count:
        return row_NKM.contiguous()
    return torch.cat((row_NKM, row_NKM[-1:].expand(count - len(row_NKM), *row_NKM.shape[1:])))


def _gathered(row_NM: Tensor, rows_E: list[int], own: int, wire: Wire) -> Tensor:
    """Return the rows of all experts in their order, of which each rank of the tensor group has those of some."""
    groups = wire.groups
    of_place = [
        [expert for expert in range(len(rows_E)) if expert // own % len(groups.tensor) == place]
        for place in range(len(groups.tensor))
    ]
    lengths = [sum(rows_E[expert] for expert in held) for held in of_place]
    all_NM = wire.all_gather_rows(row_NM, lengths, groups.tensor)
    numbers = [expert for held in of_place for expert in held]
    parts = dict(zip(numbers, torch.split(all_NM, [rows_E[expert] for expert in numbers]), strict=True))
    return torch.cat([parts[expert] for expert in range(len(rows_E))])
