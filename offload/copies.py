"""How bytes get from the host's memory into the buffers that are computed with.

On a CPU these buffers are host memory: the disk is read straight into them, and what DRAM keeps is copied by the thread
that would have read it (`Inline`). A GPU has memory of its own: all bytes pass through the host, and are copied by a
lane of the GPU's that runs beside the computation (`Staged`). Two waits keep such copies apart from the computation,
and one from the disk's reads:

    arrive(slot)     what is computed from now on waits until the slot's bytes are there
    leave(slot)      the next copy into the slot waits until what was computed up to now is done
    settle(slot)     this thread waits until the slot's host buffer has been read

What was computed comes back to the host the same way (`save`), once the computation is past a mark.

A lane is a CUDA stream, or a thread, with which all of this runs without a GPU.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec.ambient import CPU
from ..spec.errors import MachineError
from .direct import aligned_buffer

_cuda: Any = torch.cuda  # streams and the runtime are untyped in torch

Buffer = memoryview | Tensor
"""Bytes: of the host, or uint8 on a device."""


class Copies(Protocol):
    """The operations that fill a slot of a few. The computing thread calls `arrive`, `leave`, `computed` and `drain`;
    those that read and write call `copy`, `save` and `settle`."""

    device: torch.device
    staged: bool
    """Whether the disk is read into host buffers, one for each slot."""

    def host_buffer(self, nbytes: int) -> memoryview: ...

    def free(self, buffer: memoryview) -> None:
        """Give back a host buffer that nothing is copied from any more."""
        ...

    def device_buffer(self, nbytes: int) -> Buffer: ...

    def copy(self, slot: int, target: Buffer, source: memoryview) -> None: ...

    def arrive(self, slot: int) -> None: ...

    def leave(self, slot: int) -> None: ...

    def settle(self, slot: int) -> None: ...

    def computed(self) -> Any:
        """Return the mark of what was computed up to now."""
        ...

    def save(self, slot: int, pairs: Sequence[tuple[memoryview, Buffer]], after: Any) -> None:
        """Copy bytes of a slot into host memory, the target first, once the computation is past a mark; return then."""
        ...

    def drain(self) -> None:
        """Wait until what was computed up to now is done."""
        ...

    def finish(self) -> None:
        """Wait until no copy is under way."""
        ...


class Inline:
    """The copies of a CPU: there are no others under way once `copy` returns."""

    device = CPU
    staged = False

    def host_buffer(self, nbytes: int) -> memoryview:
        return aligned_buffer(nbytes)

    def free(self, buffer: memoryview) -> None:
        pass

    def device_buffer(self, nbytes: int) -> Buffer:
        return aligned_buffer(nbytes)

    def copy(self, slot: int, target: Buffer, source: memoryview) -> None:
        assert isinstance(target, memoryview)
        target[: len(source)] = source

    def arrive(self, slot: int) -> None:
        pass

    def leave(self, slot: int) -> None:
        pass

    def settle(self, slot: int) -> None:
        pass

    def computed(self) -> Any:
        return None

    def save(self, slot: int, pairs: Sequence[tuple[memoryview, Buffer]], after: Any) -> None:
        for target, source in pairs:
            assert isinstance(source, memoryview)
            target[:] = source

    def drain(self) -> None:
        pass

    def finish(self) -> None:
        pass


class Lane(Protocol):
    """Runs copies one after the other, beside the computation. A mark is a moment of the lane or the computation."""

    device: torch.device

    def host_buffer(self, nbytes: int) -> memoryview: ...

    def free(self, buffer: memoryview) -> None: ...

    def run(self, copy: Callable[[], object], after: Any) -> Any:
        """Have a copy done once `after`, a mark of the computation or None, is past; returns the mark of its end."""
        ...

    def computed(self) -> Any:
        """Return the mark of what was computed up to now."""
        ...

    def wait(self, mark: Any) -> None:
        """Let what is computed from now on wait for a mark of the lane."""
        ...

    def synchronize(self, mark: Any) -> None:
        """Wait for a mark of the lane."""
        ...

    def drain(self) -> None:
        """Wait until what was computed up to now is done."""
        ...


class Staged:
    """The copies of a device with a memory of its own."""

    staged = True

    def __init__(self, lane: Lane) -> None:
        self.device = lane.device
        self._lane = lane
        self._copied: dict[int, Any] = {}
        self._left: dict[int, Any] = {}
        self._made: Any = None
        """The mark before which memory of the newest buffer may still have been used for something else."""

    def host_buffer(self, nbytes: int) -> memoryview:
        return self._lane.host_buffer(nbytes)

    def free(self, buffer: memoryview) -> None:
        self._lane.free(buffer)

    def device_buffer(self, nbytes: int) -> Buffer:
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self._made = self._lane.computed()
        return buffer

    def copy(self, slot: int, target: Buffer, source: memoryview) -> None:
        assert isinstance(target, Tensor)
        host, part = _bytes(source), target[: len(source)]
        after = self._left.pop(slot, self._made)
        self._copied[slot] = self._lane.run(lambda: part.copy_(host, non_blocking=True), after)

    def arrive(self, slot: int) -> None:
        if slot in self._copied:
            self._lane.wait(self._copied[slot])

    def leave(self, slot: int) -> None:
        self._left[slot] = self._lane.computed()

    def settle(self, slot: int) -> None:
        if slot in self._copied:
            self._lane.synchronize(self._copied[slot])

    def computed(self) -> Any:
        return self._lane.computed()

    def save(self, slot: int, pairs: Sequence[tuple[memoryview, Buffer]], after: Any) -> None:
        def copies() -> None:
            for target, source in pairs:
                assert isinstance(source, Tensor)
                _bytes(target).copy_(source, non_blocking=True)

        if pairs:
            self._lane.synchronize(self._lane.run(copies, after))

    def drain(self) -> None:
        self._lane.drain()

    def finish(self) -> None:
        for mark in list(self._copied.values()):
            self._lane.synchronize(mark)


class ThreadLane:
    """A thread, each of whose copies begins `delay_s` late. The computation is the CPU's: past when it is left."""

    device = CPU

    def __init__(self, delay_s: float = 0.0) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._delay_s = delay_s

    def host_buffer(self, nbytes: int) -> memoryview:
        return aligned_buffer(nbytes)

    def free(self, buffer: memoryview) -> None:
        pass

    def run(self, copy: Callable[[], object], after: Any) -> Any:
        def late() -> None:
            time.sleep(self._delay_s)
            copy()

        return self._thread.submit(late)

    def computed(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        assert isinstance(mark, Future)
        mark.result()

    def synchronize(self, mark: Any) -> None:
        self.wait(mark)

    def drain(self) -> None:
        pass


class CudaLane:
    """A CUDA stream of its own, from host memory that is pinned. It was written without a GPU, and never ran on one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _cuda.Stream(device)

    def host_buffer(self, nbytes: int) -> memoryview:
        """Return memory that the GPU reads by itself. Raises `MachineError` where the system does not lock it."""
        buffer = aligned_buffer(nbytes)
        failed = int(_cuda.cudart().cudaHostRegister(_address(buffer), nbytes, 0))
        if failed:
            raise MachineError(
                f"{nbytes:,} bytes of memory cannot be pinned for {self.device} (CUDA error {failed}); "
                "give a smaller DRAM budget"
            )
        return buffer

    def free(self, buffer: memoryview) -> None:
        _cuda.cudart().cudaHostUnregister(_address(buffer))

    def run(self, copy: Callable[[], object], after: Any) -> Any:
        with _cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            copy()
            return self._stream.record_event()

    def computed(self) -> Any:
        return _cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        _cuda.current_stream(self.device).wait_event(mark)

    def synchronize(self, mark: Any) -> None:
        mark.synchronize()

    def drain(self) -> None:
        _cuda.current_stream(self.device).synchronize()


def copies_for(device: torch.device) -> Copies:
    """Return how bytes get to a device."""
    return Inline() if device.type == "cpu" else Staged(CudaLane(device))


def _bytes(buffer: memoryview) -> Tensor:
    given: Any = buffer
    return torch.frombuffer(given, dtype=torch.uint8)


def _address(buffer: memoryview) -> int:
    return _bytes(buffer).data_ptr()
