"""The reference on many ranks as a path: the `Decoder` protocol, and generation on a pipeline's schedule.

Sequences are dealt out to the data groups in turn: of a batch on two data groups, sequences 0, 2, 4 ... belong to the
first. Those that are computed at the same time, one in each data group, make a round, and rounds are what a pipeline
divides into micro-batches. A sequence's keys and values stay on the ranks that computed them: of every stage, those of
its data group, each with its own heads.

Weights are taken through storage whole and cut then: a rank that quantized its own slice would have scales of its own.

Shapes: R ranks of a stage (a list), T new tokens, M hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from ...spec.ambient import pinned
from ...spec.config import Storage
from ...spec.decoder import Sequences, check_open, checked_tokens
from ...spec.errors import RequestError
from ...spec.parallel import ParallelConfig, check_parallel
from ...spec.weights import WeightSource
from ..cache import KVCache
from ..path import ReferencePath
from .ledger import Ledger
from .pipeline import execute
from .ranks import RankWeights, cut, empty_caches
from .schedule import Schedule, baseline
from .stage import Stage
from .tensor import layer
from .vocabulary import embed_over_ranks, logits_over_ranks

Caches = tuple[tuple[tuple[KVCache, ...], ...], ...]
"""Of one sequence: by stage, by rank of its tensor group, by layer of the stage."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    caches: Caches
    last_logits_V: Tensor | None = None

    @property
    def length(self) -> int:
        return self.caches[0][0][0].length


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What goes from stage to stage: the hidden vectors on each rank, and at the end the logits."""

    x_RBTM: list[Tensor]


class ParallelSequences:
    """Sequences held open by a `ParallelReference`."""

    def __init__(self, owner: "ParallelReference", states: list[_Sequence]):
        self.owner = owner
        self._states: list[_Sequence] | None = states

    @property
    def states(self) -> list[_Sequence]:
        if self._states is None:
            raise RequestError("these sequences are closed; open new ones")
        return self._states

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(state.length for state in self.states)

    def close(self) -> None:
        self._states = None
