"""Rank 0 leads: it takes the calls of a `Decoder` and has every other rank make them too.

What is sampled is sampled once, by whoever calls the leader; the others learn each token when it is given back to the
model. Calls are told through the job's store, which costs a message and waits for nobody: stages work on what was
submitted while the next call is on its way.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..spec.config import ModelConfig
from ..spec.decoder import Sequences, check_open, checked_tokens
from ..spec.errors import RequestError
from .groups import PATIENCE
from .member import Member
from .path import RankPath
from .sequences import ParallelSequences, Ticket
from .watch import Doing

_KEPT = 256
"""Calls that stay in the store; no rank is as far behind."""


class LedSequences:
    """Sequences that all ranks hold open together."""

    def __init__(self, leader: "Leader", number: int, inner: ParallelSequences) -> None:
        self.leader, self.number, self.inner = leader, number, inner
        self._closed = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.inner.lengths

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.leader.tell("close", self.number)
            self.inner.close()


@dataclass(frozen=True, slots=True, eq=False)
class LedTicket:
    """A call that all ranks have begun."""

    number: int
    inner: Ticket


class Leader:
    """Implements `twinfer.spec.decoder.Decoder` on rank 0, while the others `follow`."""

    def __init__(self, path: RankPath, member: Member) -> None:
        self.path = path
        self._member = member
        self._told = 0
        self._numbers = 0
        member.progress.doing = Doing.IDLE

    @property
    def config(self) -> ModelConfig:
        return self.path.config

    @property
    def device(self) -> torch.device:
        return self.path.device

    @property
    def max_batch(self) -> int | None:
        return self.path.max_batch

    @property
    def in_flight(self) -> int:
        return self.path.in_flight

    def open(self, batch: int, reserve: int) -> LedSequences:
        check_open(self.config, self.max_batch, batch, reserve)
        number = self._number()
        self.tell("open", number, batch, reserve)
        return LedSequences(self, number, self.path.open(batch, reserve))

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
        return self.collect(self.submit(sequences, new_tokens, every_position=every_position))

    def submit(self, sequences: Sequences, new_tokens: Sequence[Tensor], *, every_position: bool = False) -> LedTicket:
        """Have all ranks begin an extension."""
        if not isinstance(sequences, LedSequences) or sequences.leader is not self:
            raise RequestError("the sequences were opened by another path; open them with this one")
        sequences.inner.check_open()
        tokens = checked_tokens(self.config, sequences.lengths, new_tokens)  # nothing impossible is told
        number = self._number()
        self.tell("submit", number, sequences.number, tokens, every_position)
        self._member.progress.doing = Doing.COMPUTING
        inner = self.path.submit(sequences.inner, new_tokens, every_position=every_position)
        self._member.progress.doing = Doing.IDLE
        return LedTicket(number, inner)

    def collect(self, ticket: LedTicket) -> Tensor | list[Tensor]:
        """Wait for the logits of a call that was submitted."""
        self.tell("collect", ticket.number)
        return self.path.collect(ticket.inner)

    def everywhere(self, method: str, *arguments: int) -> Any:
        """Have every rank call a method of its path, in which they agree; returns what this rank's returns."""
        self.tell("everywhere", method, *arguments)
        return getattr(self.path, method)(*arguments)

    def end(self) -> None:
        """Let the other ranks go."""
        self.tell("end")

    def tell(self, call: str, *arguments: Any) -> None:
        store = self._member.store
        store.set(f"call/{self._told}", json.dumps([call, *arguments]))
        if self._told >= _KEPT:
            store.delete_key(f"call/{self._told - _KEPT}")
        self._told += 1

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers


def follow(path: RankPath, member: Member) -> None:
    """Make the leader's calls on this rank until it ends."""
    opened: dict[int, ParallelSequences] = {}
    begun: dict[int, Ticket] = {}
    member.store.set_timeout(PATIENCE)
    told = 0
    while True:
        member.progress.doing = Doing.IDLE
        call, *arguments = json.loads(member.store.get(f"call/{told}"))
        told += 1
        member.progress.doing = Doing.COMPUTING
        match call:
            case "open":
                number, batch, reserve = arguments
                opened[number] = path.open(batch, reserve)
            case "submit":
                number, sequences, tokens, every_position = arguments
                new_tokens = [torch.tensor(each, dtype=torch.int64) for each in tokens]
                begun[number] = path.submit(opened[sequences], new_tokens, every_position=every_position)
            case "collect":
                path.collect(begun.pop(arguments[0]))
            case "everywhere":
                method, *given = arguments
                getattr(path, method)(*given)
            case "close":
                opened.pop(arguments[0]).close()
            case "end":
                return
