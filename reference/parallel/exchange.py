"""Three ways to bring rows from every rank of an expert group to every other, among p ranks (DeepSpeed-MoE, 5.3).

    direct          one all-to-all of all p: p - 1 peers a rank
    hierarchical    first among the G ranks of a node, then among equal places of the nodes: G - 1 + p / G - 1 peers,
                    and up to twice the bytes. Pays where messages are small.
    coordinated     (PCC) the L ranks of a tensor group hold the same rows, so a rank sends only what is destined for
                    ranks of its own tensor place, p / L - 1 peers; what else its group needs back is gathered there

Here a node is a tensor group. Rank j's piece for rank i is a tensor of rows, of any number; the receiver knows the
numbers, as it must for any exchange of unequal pieces.

Coordinated, in the paper's four steps (Fig. 5; 4 ranks, tensor groups {0, 1} with blocks A B C D and {2, 3} with E F G
H, block i of each for rank i): 1. ranks of tensor place 0 keep A C and E G, those of place 1 B D and F H; 2. all-to-all
among equal places: rank 0 gets A E, rank 2 C G, rank 1 B F, rank 3 D H; 3. after the experts the same in reverse, then
an all-gather within the tensor group; 4. the order A B C D is restored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec.parallel import Exchange, Groups, ParallelConfig
from .collectives import all_gather, all_to_all
from .ledger import Ledger
from .stage import Stage

Pieces = list[Tensor]
"""Of one rank: a piece for, or from, each rank that it exchanges with, in their order."""


def exchange_groups(parallel: ParallelConfig) -> Groups:
    """Return which ranks of a stage exchange rows with one another.

    >>> exchange_groups(ParallelConfig(data=2, tensor=2, expert=4, exchange=Exchange.COORDINATED))
    ((0, 2), (1, 3))
    """
    if parallel.exchange is not Exchange.COORDINATED:
        return parallel.expert_groups
    return tuple(
        group[place :: parallel.tensor] for group in parallel.expert_groups for place in range(parallel.tensor)
    )


def experts_of_peers(parallel: ParallelConfig, experts: int) -> list[list[range]]:
    """List, for each rank of a stage, the experts on each rank that it exchanges rows with.

    >>> experts_of_peers(ParallelConfig(data=2, tensor=2, expert=4, exchange=Exchange.COORDINATED), 8)[3]
    [range(2, 4), range(6, 8)]
    """
    own = experts // parallel.expert
    peers = {rank: group for group in exchange_groups(parallel) for rank in group}
    places = [[parallel.place(peer).expert for peer in peers[rank]] for rank in range(parallel.stage_ranks)]
    return [[range(place * own, (place + 1) * own) for place in each] for each in places]


def swap(pieces_R: Sequence[Pieces], stage: Stage) -> list[Pieces]:
    """Bring piece i of rank j of each group to rank i, as its piece j; done twice, all are back."""

    def collective(values: list[Pieces], ranks: list[int], ledger: Ledger) -> list[Pieces]:
        if stage.parallel.exchange is Exchange.HIERARCHICAL:
            return hierarchical(values, ranks, ledger, stage.parallel.tensor)
        return all_to_all(values, ranks, ledger)

    return stage.within(exchange_groups(stage.parallel), collective, pieces_R)


def hierarchical(values: Sequence[Pieces], ranks: Sequence[int], ledger: Ledger, node: int) -> list[Pieces]:
    """Do what `all_to_all` does in two steps, the ranks being `node` at a time on a node.

    Ranks 0 1 | 2 3 on two nodes; piece ji goes from rank j to rank i. Within the first node, rank 1 gets what rank 0
    has for place 1 of any node, 01 and 03, beside its own 11 and 13. Between nodes, rank 3 gets 03 and 13 from rank 1.

    >>> values = [[torch.tensor([10 * j + i]) for i in range(4)] for j in range(4)]
    >>> ledger = Ledger()
    >>> torch.cat(hierarchical(values, range(4), ledger, node=2)[3]), ledger.peers(3), sum(ledger.bytes.values())
    (tensor([ 3, 13, 23, 33]), 2, 128)
    """
    count = len(ranks)
    nodes = count // node
    to_place = [list[Tensor]()] * count
    for first in range(0, count, node):  # within a node: to place g goes all that is for place g of any node
        inside = range(first, first + node)
        packed = [[torch.cat([values[j][n * node + g] for n in range(nodes)]) for g in range(node)] for j in inside]
        to_place[first : first + node] = all_to_all(packed, [ranks[j] for j in inside], ledger)
    got: list[Pieces] = [[] for _ in range(count)]
    for place in range(node):  # between nodes: to node n goes what any rank of this node has for it
        column = range(place, count, node)
        packed = []
        for j in column:
            home = j - place
            split = [
                torch.split(piece, [len(values[home + g][n * node + place]) for n in range(nodes)])
                for g, piece in enumerate(to_place[j])
            ]
            packed.append([torch.cat([split[g][n] for g in range(node)]) for n in range(nodes)])
        for i, from_nodes in zip(column, all_to_all(packed, [ranks[j] for j in column], ledger), strict=True):
            for n, piece in enumerate(from_nodes):
                got[i] += torch.split(piece, [len(values[n * node + g][i]) for g in range(node)])
    return got


def gather_blocks(block_RE: Sequence[dict[int, Tensor]], stage: Stage, lengths_RE: Sequence[list[int]]) -> list[Pieces]:
    """Give every rank of a tensor group all blocks, each of which one of them has, in the order of their numbers.

    `lengths_RE` says how many rows each block has; `block_RE[r]` holds some blocks by number. The third and fourth step
    of the paper: 0 2 and 1 3, gathered to 0 2 1 3, put in order.

    >>> stage = Stage(0, ParallelConfig(tensor=2), Ledger())
    >>> blocks = [{0: torch.tensor([10]), 2: torch.tensor([12])}, {1: torch.tensor([11]), 3: torch.tensor([13])}]
    >>> torch.cat(gather_blocks(blocks, stage, [[1, 1, 1, 1]] * 2)[0]).tolist()
    [10, 11, 12, 13]
    """
    packed = [torch.cat([block[number] for number in sorted(block)]) for block in block_RE]
    gathered = stage.within(stage.parallel.tensor_groups, all_gather, packed)
    pieces_R: list[Pieces] = []
    for group in stage.parallel.tensor_groups:
        for rank in group:
            numbers = [number for other in group for number in sorted(block_RE[other])]
            parts = torch.split(gathered[rank], [lengths_RE[rank][number] for number in numbers])
            ordered = dict(zip(numbers, parts, strict=True))
            pieces_R.append([ordered[number] for number in sorted(ordered)])
    return pieces_R
