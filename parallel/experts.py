"""Experts on many ranks: each token is routed where it is, and its rows travel to the ranks that hold its experts.

    dispatch     all-to-all: rows sorted by expert, how many there are ahead of them
    gather       all-gather among ranks that hold other slices of the same experts
    compute      the grouped product of the compiled path, on this rank's slice of its experts
    reduce       all-reduce of those ranks; each keeps its own rows
    return       all-to-all back

Why it is faster: rows of one expert are multiplied together, whichever rank they came from, so an expert's weights are
read once a layer. How many rows there are is known only when they arrive, so this runs between compiled pieces.

Shapes: T tokens, K = top_k, A = T * K choices, E experts (of a rank, its own), N rows, M hidden, P ranks that exchange,
S slices.
"""

import torch
from torch import Tensor

from ..compiled.experts import grouped_product, sort_by_expert
from ..compiled.fetching import DOWN, UP, fetched_product
from ..compiled.mlp import inner
from ..compiled.moe import Moe
from ..spec.config import Storage
from ..spec.moe import MoeConfig
from ..spec.parallel import Exchange
from .exchange import Route, places_of, run_bounds, swap
from .wire import Wire


def serve(x_TM: Tensor, expert_TK: Tensor, weights: Moe, config: MoeConfig, storage: Storage, wire: Wire) -> Tensor:
    """Return what its experts make of each token, [T, K, M]; `weights` and `config` are this rank's share."""
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
    served_NM = _serve_slices(arrived_NM, count_PE, weights, config, storage, wire)
    returned_NM = swap(served_NM, route.back, wire)
    if groups.parallel.exchange is Exchange.COORDINATED:
        returned_NM = _gathered(returned_NM, rows_E, own, wire)
    return returned_NM[order.place_A].view(*expert_TK.shape, x_TM.shape[1])


def _serve_slices(
    row_NM: Tensor, count_PE: Tensor, weights: Moe, config: MoeConfig, storage: Storage, wire: Wire
) -> Tensor:
    """Return what this rank's experts make of the rows that arrived, complete over all slices of them."""
    slices = wire.groups.slices
    if len(slices) == 1:
        return _multiplied(row_NM, count_PE, weights, config, storage)
    count_SPE = wire.all_gather_rows(count_PE, [len(count_PE)] * len(slices), slices).view(len(slices), *count_PE.shape)
    lengths: list[int] = count_SPE.sum((1, 2)).tolist()
    all_NM = wire.all_gather_rows(row_NM, lengths, slices)
    out_NM = _multiplied(all_NM, count_SPE.flatten(0, 1), weights, config, storage)
    return torch.split(wire.all_reduce(out_NM, slices), lengths)[slices.place]


def _multiplied(row_NM: Tensor, count_PE: Tensor, weights: Moe, config: MoeConfig, storage: Storage) -> Tensor:
    """Feed rows through this rank's slice of their experts: of peer p there are count[p][e] for each expert e."""
    own = count_PE.shape[1]
    expert_N = torch.arange(own).repeat(len(count_PE)).repeat_interleave(count_PE.flatten())
    order = sort_by_expert(expert_N[:, None].to(row_NM.device), own)
    inner_NF = inner(_product(row_NM[order.choice_A], order.rows_E, weights, UP, storage), config.expert)
    return _product(inner_NF, order.rows_E, weights, DOWN, storage)[order.place_A]


def _product(x_AI: Tensor, rows_E: Tensor, weights: Moe, part: int, storage: Storage) -> Tensor:
    """Return rows sorted by expert, each times the matrix of its own, which may have to be fetched."""
    matrix = weights.experts[part]
    if weights.fetcher_1 is None:
        return grouped_product(x_AI, rows_E, matrix, storage)
    return fetched_product(x_AI, rows_E, weights.fetcher_1, part, matrix.outputs, storage)


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
