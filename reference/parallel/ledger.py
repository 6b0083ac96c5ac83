"""What ranks send each other, counted: messages and bytes by pair of ranks, and the payload of every collective call.

A call's payload is what the ranks hand in, whatever carries it. Messages depend on the algorithm. Assumed is, for R
ranks that hand in n bytes each (what does not divide by R is cut into pieces that differ by one element):

    collective       algorithm                     messages        bytes, all together
    all-reduce       ring: reduce-scatter, then    2 R (R - 1)     2 (R - 1) n
                     all-gather of the pieces
    reduce-scatter   ring, R - 1 steps             R (R - 1)       (R - 1) n
    all-gather       ring, R - 1 steps             R (R - 1)       (R - 1) R n
    all-to-all       directly between all pairs    R (R - 1)       (R - 1) n
    send             directly                      1               n

On a ring, rank r sends to rank r + 1 only (Patarasuk, Yuan 2009). An empty piece is no message, what a rank keeps for
itself is not sent, and a rank that is alone calls nobody.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Collective(StrEnum):
    """What several ranks do together."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"


@dataclass(frozen=True, slots=True)
class Call:
    """One collective call."""

    kind: Collective
    ranks: tuple[int, ...]
    """Those that take part, by their numbers in the whole job."""
    bytes: tuple[int, ...]
    """What each of them hands in; of a send, the receiver hands in nothing."""


@dataclass(slots=True)
class Ledger:
    """A record that collectives write to.

    >>> ledger = Ledger()
    >>> ledger.message(0, 1, 40)
    >>> ledger.message(0, 1, 8)
    >>> ledger.messages, ledger.bytes
    (Counter({(0, 1): 2}), Counter({(0, 1): 48}))
    """

    calls: list[Call] = field(default_factory=list)
    messages: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many went from the first of a pair to the second."""
    bytes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def call(self, kind: Collective, ranks: Sequence[int], handed_in: Sequence[int]) -> None:
        """Note a call of several ranks, and what each hands in, in bytes."""
        if len(ranks) > 1:
            self.calls.append(Call(kind, tuple(ranks), tuple(handed_in)))

    def message(self, source: int, target: int, size: int) -> None:
        """Note a message of that many bytes; nothing is sent where there is nothing to send, or nobody else."""
        if size and source != target:
            self.messages[source, target] += 1
            self.bytes[source, target] += size

    def ring(self, ranks: Sequence[int], piece_sizes: Sequence[int], *, first: int) -> None:
        """Note R - 1 steps around a ring: in the first, rank i sends on piece i + first; then always what it just got.

        Three ranks and pieces of 4, 4 and 8 bytes; each piece travels two hops:

        >>> ledger = Ledger()
        >>> ledger.ring([0, 1, 2], [4, 4, 8], first=0)
        >>> sorted(ledger.bytes.items())
        [((0, 1), 12), ((1, 2), 8), ((2, 0), 12)]
        """
        for step in range(len(ranks) - 1):
            for index, rank in enumerate(ranks):
                piece = (index + first - step) % len(ranks)
                self.message(rank, ranks[(index + 1) % len(ranks)], piece_sizes[piece])

    def between(self, groups: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Return messages and bytes between ranks of different groups: nodes, for example."""
        home = {rank: index for index, group in enumerate(groups) for rank in group}
        leaving = [pair for pair in self.messages if home[pair[0]] != home[pair[1]]]
        return sum(self.messages[pair] for pair in leaving), sum(self.bytes[pair] for pair in leaving)

    def peers(self, rank: int) -> int:
        """Return how many other ranks that rank sends to."""
        return len({target for source, target in self.messages if source == rank})
