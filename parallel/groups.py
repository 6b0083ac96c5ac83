"""Which processes work together: the groups of `ParallelConfig`, as dimensions of two meshes of the same ranks.

    stage, data, tensor                    who shares a layer, who serves other sequences, who holds other layers
    stage, replica, slice, node, place     the same ranks of a stage by what they hold of the experts

An expert group is `node` and `place` together: within it nodes are tensor groups, where they divide it; else it is
one node. A dimension of one rank has no group: who is alone calls nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..spec.parallel import ParallelConfig, Place
from .shared_sums import SharedSums, shared_sums

PATIENCE = timedelta(hours=24)
"""The time that a collective waits for a rank. That one hangs is found out elsewhere (`watch`), from its progress: a
long wait is no sign, since another rank may compile or read weights meanwhile."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Ranks that do collectives together, as one of them has it."""

    ranks: tuple[int, ...]
    """By their numbers in the whole job, in the group's order."""
    place: int
    """Of this rank among them."""
    process_group: ProcessGroup | None
    """None for a rank that is alone."""
    sums: SharedSums | None = None
    """Faster sums, where the ranks share a host."""

    def __len__(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """The groups that one rank belongs to."""

    parallel: ParallelConfig
    rank: int
    world: Group
    tensor: Group
    expert: Group
    slices: Group
    nodes: Group
    """Ranks of the same place in different nodes of an expert group."""
    node: Group
    """Ranks of one node of an expert group."""

    @property
    def place(self) -> Place:
        return self.parallel.place(self.rank)

    def neighbor(self, stages: int) -> int:
        """Return the number of this rank's like so many stages later."""
        return self.rank + stages * self.parallel.stage_ranks


def form_groups(parallel: ParallelConfig, device_type: str) -> Groups:
    """Form the groups of a job whose processes have joined torch.distributed; every rank calls this."""
    rank = dist.get_rank()
    dense = _mesh(device_type, ("stage", "data", "tensor"), (parallel.pipeline, parallel.data, parallel.tensor))
    node = parallel.tensor if parallel.expert % parallel.tensor == 0 else parallel.expert
    replicas = parallel.stage_ranks // (parallel.expert * parallel.expert_slices)
    sizes = (parallel.pipeline, replicas, parallel.expert_slices, parallel.expert // node, node)
    of_experts = _mesh(device_type, ("stage", "replica", "slice", "node", "place"), sizes)
    world = tuple(range(parallel.ranks))
    expert = None if parallel.expert == 1 else of_experts["node", "place"]._flatten("expert").get_group()
    return Groups(
        parallel=parallel,
        rank=rank,
        world=Group(world, rank, None if len(world) == 1 else _patient(dist.group.WORLD)),
        tensor=_with_sums(_group(dense, "tensor", rank)),
        expert=Group((rank,), 0, None) if expert is None else _as_group(_patient(expert), rank),
        slices=_with_sums(_group(of_experts, "slice", rank)),
        nodes=_group(of_experts, "node", rank),
        node=_group(of_experts, "place", rank),
    )


def _mesh(device_type: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> DeviceMesh:
    ranks = torch.arange(prod(sizes)).view(sizes)
    return DeviceMesh(device_type, ranks, mesh_dim_names=names)


def _group(mesh: DeviceMesh, name: str, rank: int) -> Group:
    if mesh[name].size() == 1:
        return Group((rank,), 0, None)
    return _as_group(_patient(mesh.get_group(name)), rank)


def _with_sums(group: Group) -> Group:
    """Return the group with faster sums, if its ranks can have them."""
    if group.process_group is None or dist.get_backend(group.process_group) != "gloo":
        return group
    return replace(group, sums=shared_sums(group.process_group, group.place, len(group)))


def _as_group(process_group: ProcessGroup, rank: int) -> Group:
    ranks: Sequence[int] = dist.get_process_group_ranks(process_group)
    return Group(tuple(ranks), tuple(ranks).index(rank), process_group)


def _patient(process_group: ProcessGroup | None) -> ProcessGroup:
    assert process_group is not None
    dist.distributed_c10d._set_pg_timeout(PATIENCE, process_group)
    return process_group
