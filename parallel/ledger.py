"""What one rank hands to each collective, counted where it is called: kind, ranks, bytes of payload.

A call's payload is what the rank hands in, whatever carries it: pieces of a vocabulary that does not divide are filled
up on the wire, and the filling is not counted. Not counted either is what ranks tell each other beside the model: what
to do next, what came out, and when weights are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Collective(StrEnum):
    """What several ranks do together."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"


@dataclass(frozen=True, slots=True)
class Call:
    """One collective call, as one rank makes it."""

    kind: Collective
    ranks: tuple[int, ...]
    """Those that take part, by their numbers in the whole job; of a send, the sender and the receiver."""
    bytes: int
    """What this rank hands in; the receiver of a send hands in nothing."""


@dataclass(slots=True)
class Ledger:
    """A record that collectives write to.

    >>> ledger = Ledger()
    >>> ledger.call(Collective.ALL_REDUCE, (0, 1), 48)
    >>> ledger.calls
    [Call(kind=<Collective.ALL_REDUCE: 'all_reduce'>, ranks=(0, 1), bytes=48)]
    """

    calls: list[Call] = field(default_factory=list)

    def call(self, kind: Collective, ranks: Sequence[int], handed_in: int) -> None:
        self.calls.append(Call(kind, tuple(ranks), handed_in))
