"""Bringing rows to the ranks that hold their experts, and back: three ways, as all-to-alls of real processes.

    direct          one all-to-all of the expert group
    hierarchical    one within each node, then one among equal places of the nodes; a node is a tensor group
    coordinated     (PCC) among equal places of the tensor groups only: p / L ranks. A rank sends what is destined for
                    ranks of its own place; what the others of its tensor group sent comes back by an all-gather

Why coordinated is faster: after a layer's all-reduce the L ranks of a tensor group hold the same rows, so each needs to
send only 1 / L of them, to 1 / L of the ranks.

Rows travel sorted by expert, so what goes to one rank is one run of rows. A route says how many rows go to each rank
and come from each; the way back is the same with both swapped.

Shapes: N rows, M hidden, P ranks that exchange with one another.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.parallel import Exchange
from .groups import Group, Groups
from .wire import Wire


class Route(NamedTuple):
    """How many rows go to each rank of the exchange, and how many come from each."""

    sent: list[int]
    arriving: list[int]

    @property
    def back(self) -> "Route":
        return Route(self.arriving, self.sent)


def peers_of(groups: Groups) -> Group:
    """Return the ranks that this rank exchanges rows with, in their order."""
    return groups.nodes if groups.parallel.exchange is Exchange.COORDINATED else groups.expert


def places_of(groups: Groups) -> list[int]:
    """Return the places of these ranks in the expert group, which say what experts they hold.

    Of an expert group of two tensor groups of two, the ranks of tensor place 1 have places 1 and 3.
    """
    return [groups.parallel.place(rank).expert for rank in peers_of(groups).ranks]


def swap(rows: Tensor, route: Route, wire: Wire) -> Tensor:
    """Send each rank its run of rows, and return the runs that arrive, in the order of the ranks."""
    groups = wire.groups
    if groups.parallel.exchange is not Exchange.HIERARCHICAL:
        return wire.all_to_all(rows, route.sent, route.arriving, peers_of(groups))
    return _in_two_steps(rows, route, wire)


def _in_two_steps(rows: Tensor, route: Route, wire: Wire) -> Tensor:
    """Do the same within the node first: to place g goes all that is for place g of any node; then between nodes.

    A rank knows its own numbers only, so numbers for all travel first; they are not rows and not counted.
    """
    groups = wire.groups
    node, nodes = groups.node, groups.nodes
    width, count = len(node), len(nodes)
    table = wire.all_numbers(route.sent, groups.expert)  # table[j][i]: rows of place j for place i
    own = groups.expert.place
    home = own // width * width
    pieces = torch.split(rows, route.sent)
    packed = torch.cat([pieces[n * width + g] for g in range(width) for n in range(count)])
    to_place = [sum(route.sent[n * width + g] for n in range(count)) for g in range(width)]
    arriving = [sum(table[home + g][n * width + node.place] for n in range(count)) for g in range(width)]
    inside = wire.all_to_all(packed, to_place, arriving, node)
    parts = _runs(inside, [[table[home + g][n * width + node.place] for n in range(count)] for g in range(width)])
    packed = torch.cat([parts[g][n] for n in range(count) for g in range(width)])
    to_node = [sum(table[home + g][n * width + node.place] for g in range(width)) for n in range(count)]
    from_node = [sum(table[n * width + g][own] for g in range(width)) for n in range(count)]
    return wire.all_to_all(packed, to_node, from_node, nodes)  # by node, then place: the order of the expert group


def _runs(rows: Tensor, lengths: Sequence[Sequence[int]]) -> list[tuple[Tensor, ...]]:
    """Split rows into runs of runs of these lengths."""
    each = torch.split(rows, [sum(inner) for inner in lengths])
    return [torch.split(run, list(inner)) for run, inner in zip(each, lengths, strict=True)]


def run_bounds(lengths: Sequence[int]) -> list[slice]:
    """Return where runs of these lengths lie that follow each other.

    >>> run_bounds([2, 0, 3])
    [slice(0, 2, None), slice(2, 2, None), slice(2, 5, None)]
    """
    ends = list(accumulate(lengths))
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
