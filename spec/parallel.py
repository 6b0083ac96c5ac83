"""How the ranks of a job divide a model: which of them work together, and on what.

A job has data * pipeline * tensor ranks. The layers are dealt out to pipeline stages. Within a stage, `tensor` ranks
share every layer's heads and MLP (a tensor group) and `data` such groups serve different sequences. The same ranks hold
the experts of a mixture: `expert` ranks hold different experts (an expert group), and `expert_slices` of them hold
different slices of the same experts (a slice group), so experts * slices divide the ranks of a stage; what is left over
holds replicas. Ranks are numbered with the tensor degree running fastest, then data, then the stage.

The paper's example (Fig. 4): 16 ranks, 8 experts, 4 * 4 ranks for what is not an expert, 2 slices for what is:

    >>> parallel = ParallelConfig(data=4, tensor=4, expert=8, expert_slices=2)
    >>> parallel.ranks, parallel.tensor_groups[1], parallel.expert_groups[1]
    (16, (4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15))
    >>> parallel.slice_groups[:3]
    ((0, 8), (1, 9), (2, 10))
    >>> parallel.place(13)
    Place(stage=0, data=3, tensor=1, expert=5, expert_slice=1)
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from .config import ModelConfig, Storage
from .errors import RequestError
from .moe import MoeConfig
from .shard import ExpertShard, Shard, check_ranks, nearest_divisor

Groups = tuple[tuple[int, ...], ...]
"""Ranks of a stage that work together, numbered within the stage."""

LONGEST_PIECE = 512
"""Tokens of a prompt's piece, at most."""
STAGED_PIECE, PAIRED_PIECE = 80, 256
"""Tokens, at least, of a piece of a prompt that is cut so that stages overlap, or the two pieces of a pair.

Shorter ones take longer: a token of SmolLM2 in float32 on one core 3.10 ms in 64, 2.70 in 128, 2.68 in 512."""


class Exchange(StrEnum):
    """How tokens reach the ranks that hold their experts, and come back."""

    DIRECT = "direct"
    """One all-to-all in each expert group."""
    HIERARCHICAL = "hierarchical"
    """One within each node, then one between nodes; a node is a tensor group (DeepSpeed-MoE, section 5.3)."""
    COORDINATED = "coordinated"
    """Between ranks of the same place in their tensor groups only: PCC (the paper's section V-B)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands along each degree, counted from 0."""

    stage: int
    data: int
    tensor: int
    expert: int
    expert_slice: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism. Raises `RequestError` for degrees that fit no job, with the nearest that does."""

    data: int = 1
    """Groups of ranks that serve different sequences."""
    pipeline: int = 1
    """Stages that hold different layers."""
    tensor: int = 1
    """Ranks that share each layer."""
    expert: int = 1
    """Ranks that hold different experts."""
    expert_slices: int = 1
    """Ranks that hold different slices of the same experts."""
    exchange: Exchange = Exchange.DIRECT

    def __post_init__(self) -> None:
        for name in ("data", "pipeline", "tensor", "expert", "expert_slices"):
            value = getattr(self, name)
            if value < 1:
                raise RequestError(f"ParallelConfig.{name} is {value}; it must be at least 1")
        if self.stage_ranks % (self.expert * self.expert_slices):
            slices = self.expert_slices if self.stage_ranks % self.expert_slices == 0 else 1
            expert = nearest_divisor(self.stage_ranks // slices, self.expert)
            raise RequestError(
                f"expert * expert_slices is {self.expert} * {self.expert_slices}, but a stage has data * tensor = "
                f"{self.stage_ranks} ranks, which do not divide by it; the nearest that works is {expert} * {slices}"
            )
        if self.exchange is not Exchange.DIRECT and self.expert % self.tensor:
            raise RequestError(
                f"exchange is {self.exchange}, whose expert groups are whole tensor groups; expert is {self.expert}, "
                f"which does not divide by tensor = {self.tensor}: take exchange = direct"
            )

    @property
    def ranks(self) -> int:
        """How many ranks the job has."""
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """How many ranks a stage has."""
        return self.data * self.tensor

    @property
    def pairs(self) -> bool:
        """Whether tensor groups compute two pieces of prompts by turns, each while the other's sum is on its way.

        Where ranks exchange rows of experts, all of them do so for one piece after the other.
        """
        return self.tensor > 1 and self.expert * self.expert_slices == 1

    @property
    def tensor_groups(self) -> Groups:
        """Neighbors, `tensor` at a time."""
        return tuple(tuple(range(first, first + self.tensor)) for first in range(0, self.stage_ranks, self.tensor))

    @property
    def expert_groups(self) -> Groups:
        """Neighbors, `expert` at a time."""
        return tuple(tuple(range(first, first + self.expert)) for first in range(0, self.stage_ranks, self.expert))

    @property
    def slice_groups(self) -> Groups:
        """Ranks that stand at the same place of `expert_slices` neighboring expert groups."""
        block = self.expert * self.expert_slices
        return tuple(
            tuple(range(first + expert, first + block, self.expert))
            for first in range(0, self.stage_ranks, block)
            for expert in range(self.expert)
        )

    def place(self, rank: int) -> Place:
        """Return where a rank of the job stands."""
        stage, in_stage = divmod(rank, self.stage_ranks)
        data, tensor = divmod(in_stage, self.tensor)
        group, expert = divmod(in_stage, self.expert)
        return Place(stage, data, tensor, expert, group % self.expert_slices)

    def shard(self, rank: int) -> Shard:
        """Return what a rank of the job holds of its stage's layers: experts by expert and slice, the rest by tensor.

        >>> ParallelConfig(data=4, tensor=4, expert=8, expert_slices=2).shard(13)
        Shard(rank=1, ranks=4, experts=ExpertShard(rank=5, ranks=8, slice_rank=1, slices=2))
        """
        place = self.place(rank)
        experts = ExpertShard(
            rank=place.expert, ranks=self.expert, slice_rank=place.expert_slice, slices=self.expert_slices
        )
        return Shard(rank=place.tensor, ranks=self.tensor, experts=experts)


def stage_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Deal out layers to stages, neighbors together; the first stages get one more, since the last has the head too.

    >>> stage_layers(7, 3)
    (range(0, 3), range(3, 5), range(5, 7))
    """
    starts = [stage * (layers // stages) + min(stage, layers % stages) for stage in range(stages + 1)]
    return tuple(range(start, end) for start, end in pairwise(starts))


def prompt_pieces(tokens: int, parallel: ParallelConfig) -> list[int]:
    """Return the lengths of the pieces in which a sequence's new tokens pass the stages, one after the other.

    With P stages, m pieces take (m + P - 1) / (m P) of the time of one stage that has all layers: of 512 tokens on 2
    stages 7/12 with six pieces, and all of it with one.

    >>> prompt_pieces(700, ParallelConfig()), prompt_pieces(700, ParallelConfig(tensor=2))
    ([350, 350], [350, 350])
    >>> prompt_pieces(512, ParallelConfig(tensor=2)), prompt_pieces(512, ParallelConfig(pipeline=2, tensor=2))
    ([256, 256], [86, 86, 85, 85, 85, 85])
    >>> prompt_pieces(159, ParallelConfig(pipeline=2)), prompt_pieces(0, ParallelConfig())
    ([159], [0])
    """
    count = max(1, -(-tokens // LONGEST_PIECE))
    if parallel.pipeline > 1 or parallel.pairs:
        count = max(count, tokens // (STAGED_PIECE if parallel.pipeline > 1 else PAIRED_PIECE))
    return [tokens // count + (place < tokens % count) for place in range(count)]


def check_parallel(config: ModelConfig, parallel: ParallelConfig, storage: Storage | None = None) -> None:
    """Raise `RequestError`, naming the nearest degree that works, unless the model can be divided that way."""
    if parallel.pipeline > len(config.layers):
        raise RequestError(
            f"pipeline is {parallel.pipeline}, but the model has {len(config.layers)} layers and every stage needs "
            f"one; the nearest that works is {len(config.layers)}"
        )
    experts = parallel.expert * parallel.expert_slices
    if experts > 1 and not any(isinstance(layer.mlp, MoeConfig) for layer in config.layers):
        raise RequestError(
            f"expert * expert_slices is {parallel.expert} * {parallel.expert_slices}, but the model has no experts; "
            "the only degrees that work are 1 * 1"
        )
    check_ranks(
        config, parallel.tensor, storage, parallel.shard(0).experts, name="tensor", stage_ranks=parallel.stage_ranks
    )
