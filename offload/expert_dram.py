"""Experts that stay in DRAM when the device gives them up, so that they are copied there instead of read again.

A place goes through

    free -> (claim) filling -> (filled) there -> (find, done) there -> (claim by another) filling

The expert goes that was used longest ago, and only for one that a step chose while the device's own slots are full:
what passes through for a prompt fills places that are free. With room for 2:

    >>> from twinfer.offload.copies import Inline
    >>> dram = ExpertDram(Inline(), 4096)
    >>> dram.resize(2)
    >>> for expert in ((0, 0), (0, 1)):
    ...     _ = dram.claim(expert, evict=False); dram.filled(expert); dram.done(expert)
    >>> dram.claim((0, 2), evict=False) is None, dram.claim((0, 2), evict=True) is None, dram.find((0, 0)) is None
    (True, False, True)

Whoever calls holds a lock.
"""

from dataclasses import dataclass

from .copies import Copies
from .uses import Expert


@dataclass(slots=True)
class _Place:
    buffer: memoryview
    there: bool = False
    readers: int = 0


class ExpertDram:
    """Places of so many bytes in host memory. Breaking a rule raises `AssertionError`, a fault of this package."""

    def __init__(self, copies: Copies, place_bytes: int) -> None:
        self._copies, self._place_bytes = copies, place_bytes
        self._most = 0
        self._places: dict[Expert, _Place] = {}
        """Those whose last use is longest ago first."""
        self._free: list[memoryview] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are taken: as many as were needed so far."""
        return self._place_bytes * (len(self._places) + len(self._free))

    def resize(self, places: int) -> None:
        """Have another number of places; nothing may be being read or copied."""
        assert not any(self._busy(each) for each in self._places.values())
        self._most = places
        while len(self._places) > places:
            self._free.append(self._places.pop(next(iter(self._places))).buffer)
        while len(self._places) + len(self._free) > places:
            self._copies.free(self._free.pop())

    def find(self, expert: Expert) -> memoryview | None:
        """Return an expert's bytes, which stay until `done`; None where they are not there."""
        place = self._places.get(expert)
        if place is None or not place.there:
            return None
        self._places[expert] = self._places.pop(expert)
        place.readers += 1
        return place.buffer

    def claim(self, expert: Expert, *, evict: bool) -> memoryview | None:
        """Return a place to read an expert into; None where there is none, or it is being read already."""
        if expert in self._places:
            return None
        if len(self._places) < self._most:
            buffer = self._free.pop() if self._free else self._copies.host_buffer(self._place_bytes)
        else:
            gone = next((each for each, place in self._places.items() if not self._busy(place)), None)
            if gone is None or not evict:
                return None
            buffer = self._places.pop(gone).buffer
        self._places[expert] = _Place(buffer)
        return buffer

    def filled(self, expert: Expert) -> None:
        """Note that an expert's bytes are there; they are being copied."""
        place = self._places[expert]
        assert not place.there, f"{expert} is there already"
        place.there, place.readers = True, 1

    def failed(self, expert: Expert) -> None:
        """Note that an expert's bytes cannot be read."""
        place = self._places.pop(expert)
        assert not place.there, f"{expert} is there already"
        self._free.append(place.buffer)

    def done(self, expert: Expert) -> None:
        """Note that a copy has ended."""
        assert self._places[expert].readers > 0, f"{expert} is not being copied"
        self._places[expert].readers -= 1

    def _busy(self, place: _Place) -> bool:
        return not place.there or place.readers > 0
