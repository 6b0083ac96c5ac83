"""The reference on many ranks as a path: the `Decoder` protocol.

Weights are taken through storage whole and cut then: a rank that quantized its own slice would have scales of its own.
A call passes the sequences through the stages once, each round of them being a micro-batch (`job`, `schedule`).

Shapes: T new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from ...spec.ambient import pinned
from ...spec.config import Storage
from ...spec.decoder import Sequences, check_open, checked_tokens
from ...spec.errors import RequestError
from ...spec.parallel import ParallelConfig, check_parallel
from ...spec.weights import WeightSource
from ..path import ReferencePath
from .job import Job, SequenceState
from .pipeline import execute
from .ranks import cut
from .schedule import baseline


class ParallelSequences:
    """Sequences held open by a `ParallelReference`."""

    def __init__(self, owner: "ParallelReference", states: list[SequenceState]):
        self.owner = owner
        self._states: list[SequenceState] | None = states

    @property
    def states(self) -> list[SequenceState]:
        if self._states is None:
            raise RequestError("these sequences are closed; open new ones")
        return self._states

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(state.length for state in self.states)

    def close(self) -> None:
        self._states = None


class ParallelReference:
    """A model on many ranks, all of them in this process. `job.ledger` counts what they send each other.

    Raises `RequestError`, before anything is read, for a model that cannot be divided that way.
    """

    def __init__(
        self,
        source: WeightSource,
        parallel: ParallelConfig,
        *,
        storage: Storage = Storage.FLOAT32,
        compute: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        check_parallel(source.config, parallel, storage)
        whole = ReferencePath(source, storage=storage, compute=compute, device=device)
        self.config, self.device = whole.config, whole.device
        self.max_batch: int | None = None
        self.job = Job(whole.config, parallel, cut(whole.weights, whole.config, parallel), compute, whole.device)

    def open(self, batch: int, reserve: int) -> ParallelSequences:
        check_open(self.config, self.max_batch, batch, reserve)
        return ParallelSequences(self, [self.job.new_sequence()] * batch)

    @overload
    def extend(
        self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def extend(
        self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: Literal[True]
    ) -> list[Tensor]: ...

    def extend(
        self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: bool = False
    ) -> Tensor | list[Tensor]:
        sequences = self._own(sequences)
        checked_tokens(self.config, sequences.lengths, new_tokens)
        states, tokens = list(sequences.states), [token_T.to(self.device) for token_T in new_tokens]
        rounds = self.job.rounds(len(states))

        def leave(micro_batch: int, token: int, x_RBTM: list[Tensor]) -> list[Tensor]:
            return self.job.leave(x_RBTM if every_position else [x_BTM[:, -1:] for x_BTM in x_RBTM])

        with pinned(self.device):
            results = execute(
                baseline(self.job.parallel.pipeline, len(rounds), 1),
                lambda micro_batch, token, _: self.job.enter(rounds[micro_batch], states, tokens),
                lambda stage, micro_batch, token, x_RBTM: self.job.work(stage, rounds[micro_batch], states, x_RBTM),
                leave,
            )
        logits = [row for micro_batch in range(len(rounds)) for row in results[micro_batch, 0]][: len(states)]
        for index, logits_TV in enumerate(logits):
            last_V = logits_TV[-1] if len(logits_TV) else states[index].last_logits_V
            states[index] = replace(states[index], last_logits_V=last_V)
        sequences.states[:] = states
        return logits if every_position else torch.stack([_last(state) for state in states])

    def _own(self, sequences: Sequences) -> ParallelSequences:
        if not isinstance(sequences, ParallelSequences) or sequences.owner is not self:
            raise RequestError("the sequences were opened by another path; open them with this one")
        return sequences


def _last(state: SequenceState) -> Tensor:
    assert state.last_logits_V is not None, "checked_tokens lets no sequence stay empty"
    return state.last_logits_V
