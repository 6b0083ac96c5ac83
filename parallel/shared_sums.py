"""Sums among ranks of one host, through memory that they all see: a sum takes some hundredths of a millisecond.

Why it is faster: a small sum over TCP passes through two threads of each process, which have to be woken, and where
each rank keeps a core busy they wait for the core as well. Here the rank's own thread copies its part into a slot, says
so in a counter, and adds up all parts as soon as the other counters say the same.

    posted      the number of the last sum that a rank has put its part of into a slot
    finished    of each slot, the number of the last sum that a rank has read from it

Sum n lies in slot n % 4 of each rank; a rank writes there again only when all have finished with sum n - 4. All ranks
of a group begin and await the same sums in the same order, so none waits for one that waits for it.

What it relies on: whoever sees a counter sees what was written before it, as processors of the x86 family promise;
others do without. Parts are added in the order of the ranks, so all ranks have the same bits. The memory has no name,
and is gone with the processes. A rank that waits looks after the others' processes: where one has ended it raises an
error, as a collective over a closed connection does.
"""

import functools
import mmap
import os
import platform
import secrets
import select
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")

_SLOTS = 4
_BYTES = 8 << 20
"""Shared memory of a group, at most; larger parts go another way."""

_LINE = 64
"""Bytes between what different ranks write, which no cache line then holds together."""

_SPINS = 200
_YIELDING_S = 2e-3
_NAP_S = 1e-4
"""A rank that waits looks at the counters at once again, then lets other threads have its core, then sleeps."""


class SharedSums:
    """One rank's end of the sums of a group. `processes` are file descriptors of the ranks, readable once they end."""

    def __init__(self, memory: bytearray | mmap.mmap, place: int, ranks: int, processes: Sequence[int]) -> None:
        self._place, self._ranks, self._processes = place, ranks, processes
        self.most_bytes = slot_bytes(ranks)
        """The largest part that a slot holds."""
        self._counters = memoryview(memory)[: ranks * _LINE].cast("q")
        parts = torch.frombuffer(memory, dtype=torch.uint8, offset=ranks * _LINE)
        self._part_SPB = parts.view(_SLOTS, ranks, self.most_bytes)
        self.begun = 0
        """How many sums have begun."""
        self._flying: list[SharedSum | None] = [None] * _SLOTS

    def start(self, x: Tensor) -> "SharedSum":
        """Begin to add up x, which is contiguous and at most so large; the sum will be in its memory."""
        self.begun += 1
        number, slot = self.begun, self.begun % _SLOTS
        before = self._flying[slot]
        if before is not None:
            before.wait()
        self._wait(1 + slot, number - _SLOTS)
        self._part(slot, self._place, x).copy_(x)
        self._counters[self._counter(self._place, 0)] = number
        begun = self._flying[slot] = SharedSum(self, number, x)
        return begun

    def finish(self, number: int, x: Tensor) -> None:
        """Wait for all parts of a sum and add them up in x."""
        slot = number % _SLOTS
        self._wait(0, number)
        torch.add(self._part(slot, 0, x), self._part(slot, 1, x), out=x)
        for place in range(2, self._ranks):
            x.add_(self._part(slot, place, x))
        self._counters[self._counter(self._place, 1 + slot)] = number
        self._flying[slot] = None

    def _part(self, slot: int, place: int, x: Tensor) -> Tensor:
        return self._part_SPB[slot, place, : x.nbytes].view(x.dtype).view(x.shape)

    def _counter(self, place: int, number: int) -> int:
        return place * (_LINE // 8) + number

    def _wait(self, counter: int, reached: int) -> None:
        """Wait until this counter of every rank has come so far."""
        for place in range(self._ranks):
            if place != self._place:
                self._wait_for(place, self._counter(place, counter), reached)

    def _wait_for(self, place: int, counter: int, reached: int) -> None:
        counters = self._counters
        for _ in range(_SPINS):
            if counters[counter] >= reached:
                return
        begin = time.monotonic()
        while counters[counter] < reached:
            if time.monotonic() - begin < _YIELDING_S:
                os.sched_yield()
                continue
            time.sleep(_NAP_S)
            if _has_ended(self._processes[place]) and counters[counter] < reached:
                raise RuntimeError(f"the connection is lost to place {place} of the group: its process has ended")


class SharedSum:
    """One sum; as `torch.distributed.Work`, it is waited for."""

    def __init__(self, sums: SharedSums, number: int, x: Tensor) -> None:
        self._sums, self._number, self._x = sums, number, x
        self._done = False

    def is_completed(self) -> bool:
        return self._done

    def wait(self) -> None:
        if not self._done:
            self._sums.finish(self._number, self._x)
            self._done = True


def slot_bytes(ranks: int) -> int:
    """Return how large a part may be, in bytes.

    >>> slot_bytes(2), slot_bytes(3)
    (1048576, 699008)
    """
    return _BYTES // (_SLOTS * ranks) // _LINE * _LINE


def memory_bytes(ranks: int) -> int:
    """Return how much memory a group shares."""
    return ranks * _LINE + _SLOTS * ranks * slot_bytes(ranks)


class _Told(NamedTuple):
    """What a rank tells the others of its group before it shares memory with them."""

    pid: int
    path: str | None
    """Of the first rank: where the others find the memory."""
    mark: bytes
    """What is written at its start."""


def shared_sums(process_group: ProcessGroup, place: int, ranks: int) -> SharedSums | None:
    """Return this rank's end where all ranks of the group can share memory, else None; all of them call it."""
    size = memory_bytes(ranks)
    descriptor, memory, path, mark = None, None, None, secrets.token_bytes(_LINE)
    if place == 0 and _is_possible():
        descriptor = os.memfd_create("twinfer")
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        memory[:_LINE] = mark
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    told = _gathered(_Told(os.getpid(), path, mark), process_group, ranks)
    if place > 0 and told[0].path is not None and _is_possible():
        memory = _found(told[0].path, told[0].mark, size)
    shared = all(_gathered(memory is not None, process_group, ranks))
    if descriptor is not None:
        os.close(descriptor)
    if memory is None or not shared:
        return None
    if place == 0:
        memory[:_LINE] = bytes(_LINE)
    sums = SharedSums(memory, place, ranks, [_process(each.pid) for each in told])
    _gathered(None, process_group, ranks)  # counters are zeros before any rank counts
    return sums


def _is_possible() -> bool:
    """Return whether this machine keeps stores in order, and has memory without a name."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and hasattr(os, "pidfd_open")


def _gathered(own: T, process_group: ProcessGroup, ranks: int) -> list[T]:
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, own, process_group)
    return told


def _found(path: str, mark: bytes, size: int) -> mmap.mmap | None:
    """Map the memory of another process; None where this is another host, or not to be seen from here."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return memory if memory[:_LINE] == mark else None


@functools.cache
def _process(pid: int) -> int:
    """Return a file descriptor that can be read once the process has ended; it stays open as long as this one lives."""
    return os.pidfd_open(pid)


def _has_ended(process: int) -> bool:
    looked_at = select.poll()
    looked_at.register(process, select.POLLIN)
    return bool(looked_at.poll(0))
