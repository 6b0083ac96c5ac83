"""A device without a GPU: the CPU, with buffers apart from the host's, on which what nothing orders goes wrong.

A GPU may do a copy at any time that its marks allow, so a missing wait shows now and then. Here it shows always. Bytes
are poisoned where a copy may run before the computation is done with its slot, and where a host buffer may be written
before it was copied from; what a slot holds, from when a copy is asked for, or the ring gives the slot back, until the
copy has arrived.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.offload import path, streamer
from twinfer.offload.copies import Buffer, Staged, ThreadLane
from twinfer.offload.ring import Ring

POISON = 0xFF
"""Of each byte: floats of any width that are not a number."""


class _Counted(ThreadLane):
    """A thread, whose marks of the computation are the number of uses of slots that have begun."""

    uses = 0

    def computed(self) -> Any:
        return self.uses


class Apart(Staged):
    """Copies that are as late as their waits allow: see above."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self._counted = _Counted(delay_s)
        super().__init__(self._counted)
        self._used: dict[int, int] = {}
        """For each slot the number of its last use."""
        self._past = -1
        """The latest mark of the computation that the lane is past, as it does one copy after the other."""
        self._unsettled: dict[int, set[int]] = {}
        """For each slot the addresses of host memory that was copied from, and not waited for."""

    def device_buffer(self, nbytes: int) -> Buffer:
        buffer = super().device_buffer(nbytes)
        assert isinstance(buffer, Tensor)
        return buffer.fill_(POISON)

    def copy(self, slot: int, target: Buffer, source: memoryview) -> None:
        assert isinstance(target, Tensor)
        given: Any = source
        part, address = target[: len(source)], torch.frombuffer(given, dtype=torch.uint8).data_ptr()
        ordered = self._orders(slot, self._left.get(slot, self._made))
        torn = address in self._unsettled.setdefault(slot, set())
        self._unsettled[slot].add(address)
        part.fill_(POISON)
        super().copy(slot, target, source)
        if torn or not ordered:
            self._copied[slot] = self._counted.run(lambda: part.fill_(POISON), None)

    def arrive(self, slot: int) -> None:
        super().arrive(slot)
        self._counted.uses += 1
        self._used[slot] = self._counted.uses

    def settle(self, slot: int) -> None:
        super().settle(slot)
        self._unsettled[slot] = set()

    def save(self, slot: int, pairs: Sequence[tuple[memoryview, Buffer]], after: Any) -> None:
        ordered = self._orders(slot, after)
        super().save(slot, pairs, after)
        if not ordered:
            for target, _ in pairs:
                target[:] = bytes([POISON]) * len(target)

    def _orders(self, slot: int, after: Any) -> bool:
        if after is not None:
            self._past = max(self._past, after)
        return self._past >= self._used.get(slot, 0)


class _Poisoned(Ring):
    """A ring whose buffers are poisoned when they are released."""

    buffers: Sequence[Tensor]

    def release(self, ticket: int) -> None:
        super().release(ticket)
        self.buffers[self.slot(ticket)].fill_(POISON)


COMPONENTS = ("ring", "keys and values", "experts")
"""In the order in which a path asks for the copies of each."""


def on_stand_in(patch: pytest.MonkeyPatch, delay_s: float = 0.0, **kinds: type[Apart]) -> None:
    """Have paths that are made from now on compute on the stand-in; `kinds` are the copies of some components."""
    original, asked = streamer._Reading.__init__, itertools.count()

    def begin(self: Any, *given: Any) -> None:
        original(self, *given)
        self.ring = _Poisoned(self.ring.slots)
        self.ring.buffers = self.buffers

    def copies_for(device: torch.device) -> Apart:
        return kinds.get(COMPONENTS[next(asked) % len(COMPONENTS)], Apart)(delay_s)

    patch.setattr(streamer._Reading, "__init__", begin)
    patch.setattr(path, "copies_for", copies_for)
