"""Sequences that many ranks hold together, and calls on them that have begun.

Shapes: N rows of results, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..spec.errors import RequestError
from .wire import Pending


class LocalSequences(Protocol):
    """The sequences of a data group, with the heads and layers of one rank."""

    @property
    def capacity(self) -> int: ...

    def close(self) -> None: ...


class ParallelSequences:
    """Implements `twinfer.spec.decoder.Sequences`: the keys and values that this rank holds of a batch's sequences."""

    def __init__(self, owner: object, batch: int, local: LocalSequences) -> None:
        self.owner = owner
        """The path that opened them."""
        self.local = local
        """Those of its data group, with the heads and layers of its own."""
        self.last: list[Tensor | None] = [None] * batch
        self._lengths = [0] * batch
        self._closed = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def close(self) -> None:
        self._closed = True
        self.local.close()
        self.last = []

    def check_open(self) -> None:
        if self._closed:
            raise RequestError("the sequences are closed; open new ones")

    def advance(self, gained: Sequence[int]) -> None:
        self._lengths = [length + more for length, more in zip(self._lengths, gained, strict=True)]


class Ticket(NamedTuple):
    """A call that has begun."""

    sequences: ParallelSequences
    gained: list[int]
    every_position: bool
    pending: list[Pending]
    """For each data group, the logits of its sequences that gained tokens, [N, V]."""
