"""The memory that experts lie in: slots on the device, and on one with a memory of its own what they are read through.

On a CPU slots lie in one span of addresses with room for all experts, of which memory is taken for those slots only
that the plan allows. Elsewhere only these are allocated, anew where their number changes, and what they held is gone.
Views are the same in both cases: they span all slots that there could be, of which only those that exist are asked for.
"""

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled.packing import Matrix
from ..spec.config import ModelConfig
from ..spec.moe import MoeConfig
from .copies import Buffer, Copies
from .dram import Source
from .form import Placed, Record, lying_in, rebuilt
from .store import Store
from .uses import Expert


class ExpertMemory:
    """Slots of so many bytes, and host buffers of that size."""

    def __init__(self, copies: Copies, slot_bytes: int, room: int) -> None:
        """`room` is how many slots there could be at most."""
        self.copies, self.slot_bytes, self.room = copies, slot_bytes, room
        self._slots = 1
        self._span: mmap.mmap | None = None
        self._hosts: list[memoryview] = []
        self._free: list[memoryview] = []
        if copies.staged:
            self._buffer = copies.device_buffer(slot_bytes)
        else:
            self._span = _unbacked(room * slot_bytes)
            self._buffer = memoryview(self._span)

    def resize(self, slots: int) -> bool:
        """Have so many slots; returns whether they are other memory than before. Nothing may be read or copied."""
        if self._span is not None:
            begin = slots * self.slot_bytes
            if hasattr(mmap, "MADV_DONTNEED") and begin < len(self._span):
                self._span.madvise(mmap.MADV_DONTNEED, begin)
            return False
        if slots == self._slots:
            return False
        self._slots = slots
        self._buffer = self.copies.device_buffer(max(1, slots) * self.slot_bytes)
        self._free_hosts()
        return True

    def part(self, slot: int, begin: int, nbytes: int) -> Buffer:
        """Return bytes of a slot."""
        first = slot * self.slot_bytes + begin
        return self._buffer[first : first + nbytes]

    def host(self) -> memoryview:
        """Return host memory for an expert, until it is given back."""
        if not self._free:
            self._hosts.append(self.copies.host_buffer(self.slot_bytes))
            self._free.append(self._hosts[-1])
        return self._free.pop()

    def give_back(self, host: memoryview) -> None:
        """Take back what `host` returned, or the beginning of it."""
        self._free.append(memoryview(host.obj))

    def views(self, records: tuple[Record, Record]) -> tuple[Matrix, Matrix]:
        """Return an expert's matrices with all slots in front."""
        return self._view(records[0], 0), self._view(records[1], records[0].nbytes)

    def close(self) -> None:
        self.copies.finish()
        self._free_hosts()

    def _view(self, record: Record, begin: int) -> Matrix:
        stride, room, buffer = self.slot_bytes, self.room, self._buffer

        def found(placed: Placed) -> Tensor:
            shape = room, *placed.shape
            if placed.nbytes == 0:
                return torch.empty(shape, dtype=placed.dtype, device=self.copies.device)
            strides = stride // placed.dtype.itemsize, *torch.empty(placed.shape, device="meta").stride()
            if isinstance(buffer, Tensor):
                return lying_in(buffer, begin + placed.offset, placed.dtype, shape, strides)
            flat = torch.frombuffer(buffer[begin + placed.offset :], dtype=placed.dtype)
            return flat.as_strided(shape, strides)

        matrix: Matrix = rebuilt(record.form, found)
        return matrix

    def _free_hosts(self) -> None:
        self._free.clear()
        while self._hosts:
            self.copies.free(self._hosts.pop())


class Job(NamedTuple):
    """An expert, or a part of it, on its way into a slot."""

    slot: int
    expert: Expert
    source: Source
    records: Sequence[Record]
    """Those that are read, and verified."""
    read: memoryview
    """Where they are read to."""
    host: Buffer
    """What the slot is to hold: the target itself where it is read into directly."""
    target: Buffer


def slot_bytes(store: Store) -> int:
    """Return the bytes of the largest expert; 0 where there are none."""
    sizes = (up.nbytes + down.nbytes for layer in store.experts for up, down in layer)
    return max(sizes, default=0)


def _unbacked(nbytes: int) -> mmap.mmap:
    """Return addresses for so many bytes, of which memory is taken as pages are first written."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, nbytes, flags=flags)


def most_at_once(config: ModelConfig, rows: int) -> int:
    """Return how many experts of a layer as many rows can choose at most."""
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig)]
    return max((min(each.router.experts, rows * each.router.top_k) for each in mixtures), default=0)
