"""What one rank hands to each collective, counted where it is called: kind, ranks, bytes of payload.

A call's payload is what the rank hands in, whatever carries it: pieces of a vocabulary that does not divide are filled
up on the wire, and the filling is not counted. Not counted either is what ranks tell each other beside the model: what
to do next, what came out, and when weights are read.
"""

from collections import Counter
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


class Step(StrEnum):
    """What happens to a call, in the event log."""

    BEGINS = "begins"
    IS_AWAITED = "is awaited"
    """The rank has nothing left to do that does not need the result."""


@dataclass(slots=True)
class Ledger:
    """A record that collectives write to.

    >>> ledger = Ledger()
    >>> call = ledger.call(Collective.ALL_REDUCE, (0, 1), 48)
    >>> ledger.bytes
    Counter({(<Collective.ALL_REDUCE: 'all_reduce'>, (0, 1)): 48})
    """

    keeps_calls: bool = True
    """Whether single calls are kept, of which a long generation makes many."""
    bytes: Counter[tuple[Collective, tuple[int, ...]]] = field(default_factory=Counter)
    """What was handed in, by kind and group."""
    calls: list[Call] = field(default_factory=list)
    events: list[tuple[Step, Call]] = field(default_factory=list)
    """The calls again, each where it begins and where it is awaited: what is between overlaps with it."""

    def call(self, kind: Collective, ranks: Sequence[int], handed_in: int) -> Call:
        """Note a call that begins."""
        call = Call(kind, tuple(ranks), handed_in)
        self.bytes[kind, call.ranks] += handed_in
        if self.keeps_calls:
            self.calls.append(call)
            self.events.append((Step.BEGINS, call))
        return call

    def awaited(self, call: Call) -> None:
        """Note that the rank waits for a call from here on."""
        if self.keeps_calls:
            self.events.append((Step.IS_AWAITED, call))
