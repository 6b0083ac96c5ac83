"""What a streamer did when: from it one can see that reading and computing overlapped."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    READ = "read"
    """A piece of a record was read from the disk."""
    COPY = "copy"
    """A record was copied from DRAM, or to a device; there, only the asking for it."""
    USE = "use"
    """A record was computed with."""
    WAIT = "wait"
    """The computation waited for a record."""
    KV_READ = "kv read"
    """A layer's keys and values were brought in."""
    KV_WRITE = "kv write"
    """New keys and values of a layer were written back."""
    KV_WAIT = "kv wait"
    """The computation waited for a layer's keys and values."""


class Event(NamedTuple):
    kind: Kind
    record: int
    """Place in the schedule; for keys and values the layer."""
    slot: int
    begin_s: float
    end_s: float


def seconds(events: Iterable[Event], kind: Kind) -> float:
    """Return for how long something of a kind was going on, times in which several were counted once."""
    return sum(end - begin for begin, end in _joined(events, kind))


def at_once(events: Iterable[Event], kind: Kind) -> float:
    """Return how many of a kind went on at once, on average over the time in which one did.

    >>> at_once([Event(Kind.READ, 0, 0, 0.0, 2.0), Event(Kind.READ, 1, 1, 1.0, 2.0)], Kind.READ)
    1.5
    """
    given = [each for each in events if each.kind is kind]
    return sum(each.end_s - each.begin_s for each in given) / seconds(given, kind)


def overlap_s(events: Sequence[Event]) -> float:
    """Return for how long records were read while others were computed with.

    >>> read, use = Event(Kind.READ, 1, 1, 0.0, 2.0), Event(Kind.USE, 0, 0, 1.5, 4.0)
    >>> overlap_s([read, use])
    0.5
    """
    reads, uses = _joined(events, Kind.READ), _joined(events, Kind.USE)
    return sum(
        max(0.0, min(read_end, use_end) - max(read_begin, use_begin))
        for read_begin, read_end in reads
        for use_begin, use_end in uses
    )


def _joined(events: Iterable[Event], kind: Kind) -> list[tuple[float, float]]:
    """Return the spans of a kind, those that overlap joined."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted((each.begin_s, each.end_s) for each in events if each.kind is kind):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined
