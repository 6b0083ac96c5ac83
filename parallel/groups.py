"""Which processes work together: the groups of `ParallelConfig`, as dimensions of two meshes of the same ranks.

    stage, data, tensor                    who shares a layer, who serves other sequences, who holds other layers
    stage, replica, slice, node, place     the same ranks of a stage by what they hold of the experts

An expert group is `node` and `place` together: within it nodes are tensor groups, where they divide it; else it is
one node. A dimension of one rank has no group: who is alone calls nobody. All dimensions together are the whole job.
"""

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
    node = parallel.tensor if parallel.expert % parallel.tensor == 0 else parallel.expert
    replicas = parallel.stage_ranks // (parallel.expert * parallel.expert_slices)
    dense = _mesh(device_type, stage=parallel.pipeline, data=parallel.data, tensor=parallel.tensor)
    of_experts = _mesh(
        device_type,
        stage=parallel.pipeline,
        replica=replicas,
        slice=parallel.expert_slices,
        node=parallel.expert // node,
        place=node,
    )
    return Groups(
        parallel=parallel,
        rank=dist.get_rank(),
        world=_group(dense, "stage", "data", "tensor"),
        tensor=_with_sums(_group(dense, "tensor")),
        expert=_group(of_experts, "node", "place"),
        slices=_with_sums(_group(of_experts, "slice")),
        nodes=_group(of_experts, "node"),
        node=_group(of_experts, "place"),
    )


def _mesh(device_type: str, **sizes: int) -> DeviceMesh | None:
    """Lay the ranks out by dimensions of more than one: a group of one would keep a thread of its own awake."""
    wide = {name: size for name, size in sizes.items() if size > 1}
    if not wide:
        return None
    ranks = torch.arange(prod(wide.values())).view(*wide.values())
    return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(wide))


def _group(mesh: DeviceMesh | None, *names: str) -> Group:
    """The ranks along some dimensions of the mesh, this one among them."""
    here = [name for name in mesh.mesh_dim_names or () if name in names] if mesh is not None else []
    rank = dist.get_rank()
    if mesh is None or not here:
        return Group((rank,), 0, None)
    if len(here) == mesh.ndim:
        process_group = dist.group.WORLD
    elif len(here) == 1:
        process_group = mesh.get_group(here[0])
    else:
        process_group = mesh[tuple(here)]._flatten("_".join(here)).get_group()
    assert process_group is not None, "who forms groups has joined the job"
    dist.distributed_c10d._set_pg_timeout(PATIENCE, process_group)
    ranks = tuple(dist.get_process_group_ranks(process_group))
    return Group(ranks, ranks.index(rank), process_group)


def _with_sums(group: Group) -> Group:
    """Return the group with faster sums, if its ranks can have them."""
    if group.process_group is None or dist.get_backend(group.process_group) != "gloo":
        return group
    return replace(group, sums=shared_sums(group.process_group, group.place, len(group)))
