"""Decode steps as graphs: captured once for each bucket of sizes, then replayed; CUDA graphs, or CPU graphs on a CPU.

Why it is faster: a small model at a small batch waits for its kernels to be launched; a replay launches them all at
once (the paper's section III-D). What it relies on: a decode step reads no value on the host and writes its caches in
place (tests look for both), and everything that it reads or writes lies where it lay at capture. So a graph
belongs to one tuple of caches and to one bucket of sizes, rows R and slots S:

- R is how many rows the step has.
- S is rounded up (`Device.slots`), so that a few graphs serve every length. Slots that a sequence has not reached are
  masked: they change no value, though a sum over more of them may round otherwise.

A graph is never replayed over caches that are gone, whether closed or grown: it knows them by a weak reference, which
keeps no memory. A step's numbers are written into a tensor of the graph's own, logits copied out of it, so what a
caller holds never changes. Warm-up does write into the caches: the slots that it writes, the step's own, are put back.

All CUDA graphs share one memory pool, which grows to what the largest bucket needs at once, and the logits of each.
They use it in turn: a path runs one step at a time, on one stream.

The rules above are tested on a stand-in for `Device`, on CPU graphs, and for `CudaDevice` on a GPU, where there is one:
docs/graphs.md says what was seen on an H100.

Shapes: R sequences that gain one token, S slots read, C slots of a cache, K key/value heads, D head size, V vocabulary.
"""

import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .cpu_graph import CpuGraphs
from .layers import Cache
from .weights import Model

_LEAST_SLOTS = 128
"""The smallest bucket: reading so few slots costs less than a graph for each smaller power of two."""

_MOST_GRAPHS = 16
"""Graphs kept at a time; the least recently used one goes. One sequence that grows to 8192 tokens needs 7."""

_WARM_UPS = 3
"""Runs before a capture, as torch's examples and DeepSpeed do: the first ones load kernels and choose among them."""


def bucket(longest: int, capacity: int) -> int:
    """How many slots a CUDA graph reads for sequences of at most `longest` tokens, the new one included.

    >>> [bucket(longest, capacity=700) for longest in (1, 128, 129, 512, 513)]
    [128, 128, 256, 512, 700]
    """
    return min(max(_LEAST_SLOTS, 1 << (longest - 1).bit_length()), capacity)


Step = Sequence[Sequence[int]]
"""Of each sequence, its new token, that token's position, and its first slot: three lists of R."""


class Captured(Protocol):
    """A captured call; `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None:
        """Run it again on what its tensors hold now; its result, in the same memory, is overwritten."""

    def reset(self) -> None:
        """Let go of it. The pool lives as long as any graph in it."""


class Device(Protocol):
    """What can capture calls."""

    def pool(self) -> Any:
        """A new, empty memory pool for graphs."""

    def slots(self, longest: int, capacity: int) -> int:
        """How many slots a graph reads for sequences of at most `longest` tokens; no more than the capacity."""

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, as a tensor by which no graph keeps it alive."""

    def move(self, captured: Any, old: Sequence[tuple[int, int]], new: Sequence[Tensor]) -> bool:
        """Let a captured call work on these in place of tensors of the same forms, if the device can.

        `old` is where those lay when it was captured, addresses and bytes.
        """

    def length(self, captured: Any) -> int:
        """How many calls were recorded, where that is known, else 0: the same for all buckets of a program."""

    def write(self, step_3R: Tensor, step: Step) -> None:
        """Put a step's numbers into a graph's own tensor."""

    def capture(self, call: Callable[[], Tensor], pool: Any) -> tuple[Captured, Tensor]:
        """Record the call, which it may run any number of times; and the tensor where a replay puts its result.

        What it allocates while it is recorded comes from the pool, where other graphs may use the same memory.
        """


_stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream  # untyped in torch


class CudaDevice:
    """`Device` by torch's CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def slots(self, longest: int, capacity: int) -> int:
        return bucket(longest, capacity)

    def alias(self, tensor: Tensor) -> Tensor:
        return tensor  # a CUDA graph has addresses alone

    def move(self, captured: Any, old: Sequence[tuple[int, int]], new: Sequence[Tensor]) -> bool:
        return False

    def length(self, captured: Any) -> int:
        return 0

    def write(self, step_3R: Tensor, step: Step) -> None:
        step_3R.copy_(torch.tensor(step))

    def capture(self, call: Callable[[], Tensor], pool: Any) -> tuple[Captured, Tensor]:
        """On one side stream, warm-up included: what cuBLAS sets up for a stream is then there before, not captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    for _ in range(_WARM_UPS):
                        call()
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    result = call()
            finally:
                current.wait_stream(self._stream)
        return graph, result


class _Graph(NamedTuple):
    """A captured step with what a replay reads and writes, the caches excepted, which it does not keep alive."""

    captured: Captured
    step_3R: Tensor
    slot_S: Tensor
    logits_RV: Tensor
    forms: list[Any]
    """Of the caches."""
    spans: list[tuple[int, int]]
    """Where they lay at capture: addresses and bytes."""
    cache: weakref.ref[Tensor]
    """The first of the caches, which stands for all: they come and go together."""


class DecodeGraphs:
    """The decode steps of one model as graphs, at most `most` of them at a time.

    `report` is told once, in a line of text, if steps are done without.
    """

    def __init__(
        self,
        model: Model,
        device: Device,
        most: int = _MOST_GRAPHS,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._model = model
        self._device = device
        self._most = most
        self._report = report
        self._reported = False
        self._pool: Any = None
        self._graphs: dict[Hashable, _Graph] = {}
        """Least recently used first."""
        self._lengths: dict[Callable[..., Tensor], int] = {}
        """Of the first graph of each program, which the path has compared with the plain call."""

    def slots(self, longest: int, capacity: int) -> int:
        """S of a step whose sequences hold at most `longest` tokens, the new one included."""
        return self._device.slots(longest, capacity)

    def step(
        self,
        program: Callable[..., Tensor],
        caches: tuple[Cache, ...],
        step: Step,
        slot_S: Tensor,
    ) -> Tensor:
        """What `program(model, caches, step_3R, slot_S)` gives and does, to the bit; logits [R, V], the caller's own.

        `program` and the values of `slot_S` follow from R and S: they are looked at only when a graph is captured.
        """
        rows, slots = len(step[0]), len(slot_S)
        key = self._key(caches, rows, slots)
        graph = self._graphs.get(key)
        if graph is None or self._is_gone(graph):  # then other tensors have the ids of its caches
            graph = self._moved(caches, rows, slots) or self._capture(program, caches, step, slot_S)
            length = self._device.length(graph.captured)
            if length != self._lengths.setdefault(program, length):  # it misses something: done without
                graph.captured.reset()
                if not self._reported:
                    self._reported = True
                    self._report(
                        "some steps are decoded without graphs: a capture missed calls; is this torch supported?"
                    )
                return program(self._model, caches, torch.tensor(step, device=slot_S.device), slot_S)
        self._graphs.pop(key, None)
        self._graphs[key] = graph
        self._device.write(graph.step_3R, step)
        graph.captured.replay()
        return self._handed_out(graph.logits_RV)

    def _key(self, caches: tuple[Cache, ...], rows: int, slots: int) -> Hashable:
        return rows, slots, id(caches[0].key_CKD)

    def _is_gone(self, graph: _Graph) -> bool:
        """Whether its caches are: then nothing may replay it."""
        return graph.cache() is None

    def _moved(self, caches: tuple[Cache, ...], rows: int, slots: int) -> _Graph | None:
        """A graph of such a step whose caches are gone, made to work on these."""
        forms = _forms(caches)
        for key, graph in self._graphs.items():
            same = (len(graph.logits_RV), len(graph.slot_S)) == (rows, slots)
            if same and self._is_gone(graph) and graph.forms == forms:
                borrowed = [*map(self._device.alias, _tensors(caches))]
                if self._device.move(graph.captured, graph.spans, borrowed):
                    del self._graphs[key]
                    return graph._replace(cache=weakref.ref(caches[0].key_CKD))
        return None

    def _capture(self, program: Callable[..., Tensor], caches: tuple[Cache, ...], step: Step, slot_S: Tensor) -> _Graph:
        self._make_room()
        step_3R = torch.tensor(step, device=slot_S.device)
        written_R = step_3R[1] + step_3R[2]
        before = [each_CKD[written_R] for each_CKD in _tensors(caches)]
        borrowed = tuple(Cache(*map(self._device.alias, cache)) for cache in caches)
        try:
            captured, logits_RV = self._device.capture(
                lambda: program(self._model, borrowed, step_3R, slot_S), self._pool
            )
        finally:
            self._put_back(caches, written_R, before)
        cache = weakref.ref(caches[0].key_CKD)
        return _Graph(captured, step_3R, slot_S, logits_RV, _forms(caches), _spans(caches), cache)

    def _make_room(self) -> None:
        """Let go of graphs whose caches are gone, then of the oldest, until one more may come; see to a pool for it."""
        gone = [key for key, graph in self._graphs.items() if self._is_gone(graph)]
        living = [key for key in self._graphs if key not in gone]
        for key in gone + living[: max(0, len(living) - self._most + 1)]:
            self._graphs.pop(key).captured.reset()
        if not self._graphs:  # torch lets go of a pool with the last graph in it
            self._pool = self._device.pool()

    def _put_back(self, caches: tuple[Cache, ...], written_R: Tensor, before: list[Tensor]) -> None:
        for each_CKD, rows_RKD in zip(_tensors(caches), before, strict=True):
            each_CKD[written_R] = rows_RKD

    def _handed_out(self, logits_RV: Tensor) -> Tensor:
        return logits_RV.clone()


def device_of_graphs(device: torch.device) -> Device:
    """Return what captures calls on this device."""
    return CudaDevice(device) if device.type == "cuda" else CpuGraphs()


def _forms(caches: tuple[Cache, ...]) -> list[Any]:
    return [(each.shape, each.stride()) for each in _tensors(caches)]


def _spans(caches: tuple[Cache, ...]) -> list[tuple[int, int]]:
    return [(each.data_ptr(), each.nbytes) for each in _tensors(caches)]


def _tensors(caches: tuple[Cache, ...]) -> Iterable[Tensor]:
    return itertools.chain.from_iterable(caches)
