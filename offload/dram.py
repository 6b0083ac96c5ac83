"""Records that stay in DRAM once they were read, so that they are copied instead of read from the disk.

Where a record's bytes come from is decided when its buffer of the ring is claimed (`source`):

    ABSENT -> (source: FILL) FILLING -> (filled) THERE -> (source: COPY, copied) THERE -> (want: evicted) ABSENT

A record that is not wanted comes from the DISK each time, as does one that is just being filled for another buffer.
What is wanted is spread evenly over the schedule, so that the disk has as much to do in each part of a step; no choice
of records reads less, since each is used once a step:

    >>> spread([10] * 6, room=30)
    (1, 3, 5)

`Tier` has no memory and no threads, so that the rules can be tested by themselves. Whoever calls holds a lock.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from enum import Enum, auto

from .copies import Copies


class Source(Enum):
    DISK = auto()
    FILL = auto()
    """From the disk into DRAM, and from there into the ring."""
    COPY = auto()
    """From DRAM."""


class State(Enum):
    FILLING = auto()
    THERE = auto()


def spread(sizes: Sequence[int], room: int) -> tuple[int, ...]:
    """Return which of some records to keep within so many bytes, evenly over their order."""
    kept: list[int] = []
    total, passed, taken = sum(sizes), 0, 0
    for index, size in enumerate(sizes):
        passed += size
        if (taken + size) * total <= room * passed:
            kept.append(index)
            taken += size
    return tuple(kept)


class Tier:
    """What DRAM holds. Breaking a rule raises `AssertionError`: it is a fault of this package."""

    def __init__(self) -> None:
        self.wanted: frozenset[int] = frozenset()
        self._states: dict[int, State] = {}
        self._readers: Counter[int] = Counter()

    @property
    def there(self) -> frozenset[int]:
        """The records whose bytes are in DRAM."""
        return frozenset(index for index, state in self._states.items() if state is State.THERE)

    def source(self, index: int) -> Source:
        """Return where a record's bytes come from now."""
        state = self._states.get(index)
        if state is State.THERE:
            self._readers[index] += 1
            return Source.COPY
        if state is None and index in self.wanted:
            self._states[index] = State.FILLING
            return Source.FILL
        return Source.DISK

    def filled(self, index: int) -> None:
        """Note that a record's bytes are in DRAM; it is being copied from there."""
        assert self._states.get(index) is State.FILLING, f"record {index} is {self._states.get(index)}, not FILLING"
        self._states[index] = State.THERE
        self._readers[index] += 1

    def failed(self, index: int) -> None:
        """Note that a record could not be read."""
        assert self._states.get(index) is State.FILLING, f"record {index} is {self._states.get(index)}, not FILLING"
        del self._states[index]

    def copied(self, index: int) -> None:
        """Note that a copy from DRAM has ended."""
        assert self._readers[index] > 0, f"record {index} is not being copied"
        self._readers[index] -= 1

    def busy(self, index: int) -> bool:
        """Return whether a record is being read or copied."""
        return self._states.get(index) is State.FILLING or self._readers[index] > 0

    def want(self, indices: Collection[int]) -> list[int]:
        """Keep these from now on; returns the others, which are evicted. None of them may be busy."""
        gone = [index for index in self._states if index not in indices]
        busy = [index for index in gone if self.busy(index)]
        assert not busy, f"records {busy} are being read or copied"
        for index in gone:
            del self._states[index]
        self.wanted = frozenset(indices)
        return gone

    def reset(self) -> None:
        """Forget what was not read to its end; nothing is being copied any more."""
        self._states = {index: state for index, state in self._states.items() if state is State.THERE}
        self._readers.clear()


class Dram:
    """The memory of a tier, one host buffer for each record that is there or being filled."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.tier = Tier()
        self._buffers: dict[int, memoryview] = {}

    @property
    def nbytes(self) -> int:
        return sum(map(len, self._buffers.values()))

    def want(self, indices: Collection[int]) -> None:
        """Keep these records, and no others; nothing may be read or copied meanwhile."""
        self.tier.reset()
        self.tier.want(indices)
        for index in self._buffers.keys() - self.tier.there:
            self.copies.free(self._buffers.pop(index))

    def buffer(self, index: int, nbytes: int) -> memoryview:
        """Return a record's memory."""
        if index not in self._buffers:
            self._buffers[index] = self.copies.host_buffer(nbytes)
        return self._buffers[index]
