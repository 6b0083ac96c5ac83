"""The reference on many ranks as a path: the `Decoder` protocol.

Weights are taken through storage whole and cut then: a rank that quantized its own slice would have scales of its own.
A call passes the sequences through the stages once. Of each round of them (`job`) the new tokens are cut into pieces,
and each piece is a micro-batch (`schedule`): a stage works on one while the stage before works on the next.

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
from ...spec.parallel import ParallelConfig, check_parallel, prompt_pieces
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
        parallel, states = self.job.parallel, list(sequences.states)
        pieces = [torch.split(token_T.to(self.device), prompt_pieces(len(token_T), parallel)) for token_T in new_tokens]
        micro_batches = [
            (members, place)
            for members in self.job.rounds(len(states))
            for place in range(max(len(pieces[index]) for index in members))
        ]

        def enter(micro_batch: int, token: int, _: list[list[Tensor]]) -> list[Tensor]:
            members, place = micro_batches[micro_batch]
            tokens = [each[place] if place < len(each) else each[0][:0] for each in pieces]
            return self.job.enter(members, states, tokens)

        def work(stage: int, micro_batch: int, token: int, x_RBTM: list[Tensor]) -> list[Tensor]:
            return self.job.work(stage, micro_batches[micro_batch][0], states, x_RBTM)

        def leave(micro_batch: int, token: int, x_RBTM: list[Tensor]) -> list[Tensor]:
            members, place = micro_batches[micro_batch]
            if every_position:
                return self.job.leave(x_RBTM)
            ending = {data for data, index in enumerate(members) if place + 1 == len(pieces[index])}
            data_R = [parallel.place(rank).data for rank in range(parallel.stage_ranks)]
            last_RB1M = [
                x_BTM[:, -1:] if data in ending else x_BTM[:, :0] for x_BTM, data in zip(x_RBTM, data_R, strict=True)
            ]
            return self.job.leave(last_RB1M) if ending else []

        with pinned(self.device):
            results = execute(baseline(parallel.pipeline, len(micro_batches), 1), enter, work, leave)
        found: list[list[Tensor]] = [[] for _ in states]
        for micro_batch, (members, _) in enumerate(micro_batches):
            for index, logits_TV in zip(members, results[micro_batch, 0], strict=False):
                found[index].append(logits_TV)
        logits = [torch.cat(each) for each in found]
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
