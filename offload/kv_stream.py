"""Keys and values of layers that are kept in DRAM or in a file, brought in one layer ahead and written back behind.

Layers take turns in two buffers. One thread does all reads and writes in the order in which they were asked for:

    computing   | layer 3, buffer 0  | layer 4, buffer 1             | layer 5, buffer 0
    the thread  | read 4 into 1      | write 3 from 0, read 5 into 0 | write 4 from 1, ...

so a buffer is filled anew only after what it held is written, and what a layer gained in one sweep is there when the
next one reads it. The buffers are the device's; on one that has a memory of its own, what lies in the file passes
through two buffers of the host, and what lies in DRAM is copied from and to where it lies (`kv_home`, `copies`). A
sweep brings in only what its sequences hold, from a window's first key on, and writes only the pages that gained
tokens.

A layer lies in the file as in a buffer: first all keys, then all values, each sequence's from a page on. So capacities
are whole pages in every layer (`whole_capacity`): with 3 heads of 64 floats, 768 bytes a token, multiples of 16.

Shapes: B sequences, C capacity, K key/value heads, D head size.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiled.layers import Cache
from ..spec.config import LayerConfig
from .copies import Buffer, Copies
from .events import Event, Kind
from .form import PAGE, lying_in, pages
from .kv_home import KvHome

BUFFERS = 2

_NEAR = 32 * PAGE
"""Bytes between two ranges that are read through: a request costs more than they do."""


class Span(NamedTuple):
    """What a sequence gains in a sweep: it holds `begin` tokens before, `end` after."""

    row: int
    begin: int
    end: int


class Place(NamedTuple):
    """Where a layer's keys and values lie, in the file and in a buffer."""

    batch: int
    capacity: int
    kv_heads: int
    head_size: int
    dtype: torch.dtype
    window: int | None
    offset: int
    """Bytes from the file's beginning."""

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys, or of its values."""
        return self.kv_heads * self.head_size * self.dtype.itemsize

    @property
    def part_bytes(self) -> int:
        """Bytes of all keys, or of all values."""
        return self.batch * self.capacity * self.token_bytes

    @property
    def nbytes(self) -> int:
        return 2 * self.part_bytes

    def in_buffer(self, buffer: Buffer) -> Cache:
        """Return the cache that lies in a buffer."""
        shape = self.batch * self.capacity, self.kv_heads, self.head_size
        if isinstance(buffer, Tensor):
            return Cache(*(lying_in(buffer, begin, self.dtype, shape) for begin in (0, self.part_bytes)))
        parts = (buffer[begin : begin + self.part_bytes] for begin in (0, self.part_bytes))
        return Cache(*(torch.frombuffer(part, dtype=self.dtype).view(shape) for part in parts))

    def held(self, spans: Iterable[Span]) -> list[slice]:
        """Return the bytes of a buffer that a sweep needs to find there, in runs of whole pages."""
        needed = [(each.row, self._first(each.begin), each.begin) for each in spans]
        return joined(self._ranges(needed), _NEAR)

    def gained(self, spans: Iterable[Span]) -> list[slice]:
        """Return the bytes of a buffer that a sweep changes, in runs of whole pages."""
        return joined(self._ranges([(each.row, each.begin, each.end) for each in spans]), 0)

    def _first(self, length: int) -> int:
        return 0 if self.window is None else max(0, length - self.window + 1)

    def _ranges(self, tokens: Iterable[tuple[int, int, int]]) -> Iterator[slice]:
        for row, begin, end in tokens:
            for part in (0, self.part_bytes):
                first = part + row * self.capacity * self.token_bytes
                if begin < end:
                    low = (first + begin * self.token_bytes) // PAGE * PAGE
                    yield slice(low, pages(first + end * self.token_bytes))


def whole_capacity(layers: Iterable[LayerConfig], tokens: int, dtype: torch.dtype) -> int:
    """Return the least capacity for so many tokens that is whole pages in each of these layers."""
    sizes = [layer.attention.kv_heads * layer.attention.head_size * dtype.itemsize for layer in layers]
    unit = math.lcm(*(PAGE // math.gcd(PAGE, size) for size in sizes))
    return -(-max(2, tokens) // unit) * unit


def joined(ranges: Iterable[slice], near: int) -> list[slice]:
    """Return ranges in order, those that lie no farther apart than `near` as one.

    >>> joined([slice(8, 12), slice(0, 4), slice(4, 6)], 0), joined([slice(0, 4), slice(6, 9)], 2)
    ([slice(0, 6, None), slice(8, 12, None)], [slice(0, 9, None)])
    """
    found: list[slice] = []
    for each in sorted(ranges, key=lambda one: one.start):
        if found and each.start <= found[-1].stop + near:
            found[-1] = slice(found[-1].start, max(found[-1].stop, each.stop))
        else:
            found.append(each)
    return found


def away_layers(layers: int, count: int, rank: int | None = None) -> list[int]:
    """Return which layers' keys and values are moved away when so many have to be.

    They are spread, so that each has the time of those before it to be read. Of two ranks that share a link each
    moves layers of its own parity first, and while one moves a layer the other computes one that stays.

    >>> away_layers(6, 2), away_layers(6, 2, rank=0), away_layers(6, 2, rank=1), away_layers(6, 4, rank=0)
    ([2, 5], [0, 4], [1, 5], [0, 2, 4, 5])
    """
    if rank is None:
        return _spread(list(range(layers)), count)
    own = [layer for layer in range(layers) if layer % 2 == rank % 2]
    others = [layer for layer in range(layers) if layer % 2 != rank % 2]
    return sorted(_spread(own, min(count, len(own))) + _spread(others, max(0, count - len(own))))


def _spread(layers: Sequence[int], count: int) -> list[int]:
    return [layers[(each + 1) * len(layers) // count - 1] for each in range(count)]


class KvStream:
    """Keys and values of some layers, and the two buffers in which they are computed with."""

    def __init__(self, home: KvHome, places: Mapping[int, Place], log: Callable[[Event], None], copies: Copies) -> None:
        self._home, self._places, self._log, self._copies = home, places, log, copies
        self._layers = sorted(places)
        size = max(place.nbytes for place in places.values())
        self._buffers = [copies.device_buffer(size) for _ in range(BUFFERS)]
        self._hosts = [copies.host_buffer(size) for _ in range(BUFFERS)] if copies.staged else self._buffers
        self._caches = {
            (layer, slot): places[layer].in_buffer(buffer)
            for layer in self._layers
            for slot, buffer in enumerate(self._buffers)
        }
        self._thread = ThreadPoolExecutor(1)
        self._reads: dict[int, Future[None]] = {}
        self._writes: list[Future[None]] = []
        self._marks: dict[int, Any] = {}
        """For each layer that is to be written, when it was computed."""
        self._spans: list[Span] = []

    def begin(self, spans: Sequence[Span]) -> None:
        """Begin a sweep in which these sequences gain tokens: read for the first layers."""
        self._spans = list(spans)
        for layer in self._layers[:BUFFERS]:
            self._ask(layer)

    @contextmanager
    def layer(self, layer: int) -> Iterator[Cache]:
        """Wait for a layer's keys and values, which are written back afterwards. Layers come in order."""
        slot, begin_s = self._slot(layer), time.perf_counter()
        self._reads.pop(layer).result()
        self._log(Event(Kind.KV_WAIT, layer, slot, begin_s, time.perf_counter()))
        self._copies.arrive(slot)
        yield self._caches[layer, slot]
        self._marks[layer] = self._copies.computed()
        self._writes.append(self._thread.submit(self._write, layer))
        place = self._layers.index(layer)
        for following in self._layers[place + BUFFERS : place + BUFFERS + 1]:
            self._ask(following)

    def end(self) -> None:
        """Wait until the sweep is written; raises what a write raised."""
        writes, self._writes = self._writes, []
        for each in writes:
            each.result()

    def abandon(self) -> None:
        """Wait for what is under way, whatever becomes of it: a sweep was left."""
        for each in [*self._reads.values(), *self._writes]:
            each.exception()
        self._reads, self._writes = {}, []
        self._leave()

    def put(self, layer: int, cache: Cache, capacity: int, lengths: Sequence[int]) -> None:
        """Write a layer from a cache of another capacity."""
        slot = self._slot(layer)
        self._copies.arrive(slot)
        for mine, given in zip(self._caches[layer, slot], cache, strict=True):
            for row, length in enumerate(lengths):
                start = row * self._places[layer].capacity
                mine[start : start + length] = given[row * capacity : row * capacity + length]
        self._spans = [Span(row, 0, length) for row, length in enumerate(lengths)]
        self._marks[layer] = self._copies.computed()
        self._thread.submit(self._write, layer).result()

    def get(self, layer: int, lengths: Sequence[int]) -> Cache:
        """Read a whole layer, into a buffer that the next call overwrites."""
        slot, place = self._slot(layer), self._places[layer]._replace(window=None)
        self._leave()
        self._fetch(layer, place.held([Span(row, length, length) for row, length in enumerate(lengths)]))
        self._copies.arrive(slot)
        return self._caches[layer, slot]

    def close(self) -> None:
        """End the thread, and give up what is away."""
        self._thread.shutdown()
        self._copies.finish()
        if self._copies.staged:
            while self._hosts:
                host = self._hosts.pop()
                assert isinstance(host, memoryview)
                self._copies.free(host)
        self._home.close()

    def _slot(self, layer: int) -> int:
        return self._layers.index(layer) % BUFFERS

    def _ask(self, layer: int) -> None:
        self._reads[layer] = self._thread.submit(self._read, layer)

    def _read(self, layer: int) -> None:
        begin_s = time.perf_counter()
        self._fetch(layer, self._places[layer].held(self._spans))
        self._log(Event(Kind.KV_READ, layer, self._slot(layer), begin_s, time.perf_counter()))

    def _fetch(self, layer: int, parts: Sequence[slice]) -> None:
        """Bring parts of a layer into its buffer, or have the lane bring them there."""
        slot = self._slot(layer)
        self._copies.settle(slot)
        for part in parts:
            offset = self._places[layer].offset + part.start
            host = self._home.part(offset, part.stop - part.start)
            in_dram = host is not None
            if host is None:
                host = self._host(slot, part)
                self._home.read_into(host, offset, _name(layer))
            if in_dram or self._copies.staged:
                self._copies.copy(slot, self._buffers[slot][part], host)

    def _write(self, layer: int) -> None:
        slot, begin_s, name = self._slot(layer), time.perf_counter(), _name(layer)
        saved: list[tuple[memoryview, Buffer]] = []
        written: list[tuple[memoryview, int]] = []
        for part in self._places[layer].gained(self._spans):
            offset = self._places[layer].offset + part.start
            host = self._home.part(offset, part.stop - part.start)
            if host is None:
                written.append((self._host(slot, part), offset))
            if host is not None or self._copies.staged:
                saved.append((self._host(slot, part) if host is None else host, self._buffers[slot][part]))
        self._copies.save(slot, saved, self._marks.pop(layer))
        for host, offset in written:
            self._home.write_from(host, offset, name)
        self._log(Event(Kind.KV_WRITE, layer, slot, begin_s, time.perf_counter()))

    def _host(self, slot: int, part: slice) -> memoryview:
        """Return the memory between a buffer and the disk."""
        host = self._hosts[slot][part]
        assert isinstance(host, memoryview)
        return host

    def _leave(self) -> None:
        """Let the next copies into the buffers wait for what was computed up to now."""
        for slot in range(BUFFERS):
            self._copies.leave(slot)


def _name(layer: int) -> str:
    return f"layer {layer}'s keys and values"
