"""Attention over keys and values in DRAM or a file, a block at a time: no layer's are ever in memory as a whole.

For where even one layer's do not fit. While one block is attended to, the next is read. Each query keeps the maximum m
of its scores so far, and the sums l of exp(score - m) and a of exp(score - m) * value; a block with a larger maximum
scales both sums down before it adds its own. At the end a / l is what attention over all blocks at once gives, but for
rounding (Milakov and Gimelshein 2018): so logits differ in their last bits from those with caches in memory.

A sequence's new keys and values come from the layer itself, and are written behind.

Shapes: T queries of one sequence, S keys of a block, H heads, K key/value heads, G = H / K, D head size.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..compiled.compute import accumulation_dtype
from ..compiled.layers import Cache
from ..compiled.weights import Layer
from ..spec.config import AttentionConfig
from .copies import Copies
from .direct import aligned_buffer
from .events import Event, Kind
from .form import PAGE, bytes_of, lying_in, pages
from .kv_home import KvHome
from .kv_stream import BUFFERS, Place, Span

_NEW = BUFFERS
"""Stands for the tokens that a layer gains, which lie in none of the buffers."""


class KvBlocks:
    """Keys and values of layers that are away, of which each buffer holds a block of `tokens` of one sequence."""

    def __init__(
        self,
        home: KvHome,
        places: Mapping[int, Place],
        tokens: int,
        log: Callable[[Event], None],
        copies: Copies,
    ) -> None:
        self._home, self._places, self._tokens, self._log, self._copies = home, places, tokens, log, copies
        size = max(2 * tokens * place.token_bytes for place in places.values())
        self._buffers = [copies.device_buffer(size) for _ in range(BUFFERS)]
        self._hosts = [copies.host_buffer(size) for _ in range(BUFFERS)] if copies.staged else self._buffers
        self._thread = ThreadPoolExecutor(1)
        self._writes: list[Future[None]] = []

    def attend(
        self,
        layer: int,
        weights: Layer,
        config: AttentionConfig,
        spans: Sequence[Span],
        query_THD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
    ) -> Tensor:
        """Return what queries mix of the values of their sequences; `spans` say whose rows follow each other.

        Rows beyond those of the spans only fill up, and are as the last one.
        """
        out_THD, row = torch.zeros_like(query_THD), 0
        for span in spans:
            rows = slice(row, row := row + span.end - span.begin)
            sums = _Sums(query_THD[rows], span, weights, config)
            new = key_TKD[rows].contiguous(), value_TKD[rows].contiguous()
            for first, (key_SKD, value_SKD) in self._blocks(layer, span, config.window):
                sums.add(first, key_SKD, value_SKD)
            sums.add(span.begin, *new)
            out_THD[rows] = sums.out()
            self._writes.append(self._thread.submit(self._write, layer, span, new, self._copies.computed()))
        out_THD[row:] = out_THD[row - 1]
        return out_THD

    def put(self, layer: int, cache: Cache, capacity: int, lengths: Sequence[int]) -> None:
        """Write a layer from a cache of another capacity."""
        for row, length in enumerate(lengths):
            start = row * capacity
            key, value = (each[start : start + length] for each in cache)
            if length:
                given = layer, Span(row, 0, length), (key, value), self._copies.computed()
                self._thread.submit(self._write, *given).result()

    def get(self, layer: int, lengths: Sequence[int]) -> Cache:
        """Read a whole layer, into memory that is taken for it."""
        place = self._places[layer]
        shape = place.batch * place.capacity, place.kv_heads, place.head_size
        cache = Cache(*(torch.zeros(shape, dtype=place.dtype, device=self._copies.device) for _ in Cache._fields))
        for row, length in enumerate(lengths):
            for first, parts in self._blocks(layer, Span(row, length, length), None):
                start = row * place.capacity + first
                for mine, part in zip(cache, parts, strict=True):
                    mine[start : start + len(part)] = part
        return cache

    def end(self) -> None:
        """Wait until what was gained is written; raises what a write raised."""
        writes, self._writes = self._writes, []
        for each in writes:
            each.result()

    def abandon(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        for each in self._writes:
            each.exception()
        self._writes = []
        for slot in range(BUFFERS):
            self._copies.leave(slot)

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

    def _blocks(self, layer: int, span: Span, window: int | None) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Yield the first position of each block of what a sequence holds, and its keys and values."""
        first = 0 if window is None else max(0, span.begin - window + 1)
        begins = range(first // self._tokens * self._tokens, span.begin, self._tokens)
        reads: list[Future[tuple[Tensor, Tensor]]] = []
        for number in range(len(begins) + 1):
            if number < len(begins):
                given = layer, span, begins[number], number % BUFFERS
                reads.append(self._thread.submit(self._read, *given))
            if number > 0:
                slot, found = (number - 1) % BUFFERS, reads[number - 1].result()
                self._copies.arrive(slot)
                yield begins[number - 1], found
                self._copies.leave(slot)

    def _read(self, layer: int, span: Span, first: int, slot: int) -> tuple[Tensor, Tensor]:
        place, begin_s = self._places[layer], time.perf_counter()
        count = min(self._tokens, span.begin - first)
        nbytes, size = pages(count * place.token_bytes), self._tokens * place.token_bytes
        shape = count, place.kv_heads, place.head_size
        buffer, host = self._buffers[slot], self._hosts[slot]
        found = []
        self._copies.settle(slot)
        for part in range(2):
            where = slice(part * size, part * size + nbytes)
            staged = host[where]
            assert isinstance(staged, memoryview)
            self._home.read_into(staged, self._offset(place, part, span.row, first), _name(layer))
            if isinstance(buffer, Tensor):
                self._copies.copy(slot, buffer[where], staged)
                found.append(lying_in(buffer, where.start, place.dtype, shape))
            else:
                given: Any = staged
                found.append(torch.frombuffer(given, dtype=place.dtype)[: math.prod(shape)].view(shape))
        self._log(Event(Kind.KV_READ, layer, slot, begin_s, time.perf_counter()))
        return found[0], found[1]

    def _write(self, layer: int, span: Span, new: tuple[Tensor, Tensor], after: Any) -> None:
        """Write what a sequence gained, in whole pages: what was in the first one before is read and written again.

        `after` is the mark of when it was computed.
        """
        place, begin_s = self._places[layer], time.perf_counter()
        low = span.begin * place.token_bytes // PAGE * PAGE
        buffer = aligned_buffer(pages(span.end * place.token_bytes) - low)
        held = span.begin * place.token_bytes - low
        for part, tokens_TKD in enumerate(new):
            offset = self._offset(place, part, span.row, 0) + low
            if held:
                self._home.read_into(buffer[:PAGE], offset, _name(layer))
            source = tokens_TKD.view(-1).view(torch.uint8) if self._copies.staged else bytes_of(tokens_TKD)
            self._copies.save(_NEW, [(buffer[held : held + tokens_TKD.nbytes], source)], after)
            self._home.write_from(buffer, offset, _name(layer))
        self._log(Event(Kind.KV_WRITE, layer, 0, begin_s, time.perf_counter()))

    def _offset(self, place: Place, part: int, row: int, token: int) -> int:
        return place.offset + part * place.part_bytes + (row * place.capacity + token) * place.token_bytes


class _Sums:
    """The running softmax of one sequence's queries."""

    def __init__(self, query_THD: Tensor, span: Span, weights: Layer, config: AttentionConfig) -> None:
        wide = accumulation_dtype(query_THD.dtype)
        tokens, _, size = query_THD.shape
        self._config, self._dtype = config, query_THD.dtype
        self._device = query_THD.device
        self._position_T = torch.arange(span.begin, span.end, device=self._device)
        self._query_KTGD = query_THD.reshape(tokens, config.kv_heads, -1, size).transpose(0, 1).to(wide)
        kv_heads, _, group, _ = self._query_KTGD.shape
        self._slope_KG = None if weights.slope_H is None else weights.slope_H.view(kv_heads, group)
        self._most_KTG = torch.full((kv_heads, tokens, group), -torch.inf, dtype=wide, device=self._device)
        self._total_KTG = torch.zeros(kv_heads, tokens, group, dtype=wide, device=self._device)
        self._mixed_KTGD = torch.zeros_like(self._query_KTGD)
        if weights.sink_H is not None:  # a key of its own, whose value is zero
            self._most_KTG = weights.sink_H.view(kv_heads, 1, group).to(wide).expand(-1, tokens, -1)
            self._total_KTG = torch.ones_like(self._total_KTG)

    def add(self, first: int, key_SKD: Tensor, value_SKD: Tensor) -> None:
        """Take in the keys and values from position `first` on."""
        config, wide = self._config, self._query_KTGD.dtype
        distance_TS = self._position_T[:, None] - torch.arange(first, first + len(key_SKD), device=self._device)
        seen_TS = distance_TS >= 0 if config.window is None else (distance_TS >= 0) & (distance_TS < config.window)
        score_KTGS = self._query_KTGD @ key_SKD.to(wide).permute(1, 2, 0)[:, None] * config.scale
        if config.softcap is not None:
            score_KTGS = config.softcap * torch.tanh(score_KTGS / config.softcap)
        if self._slope_KG is not None:
            score_KTGS = score_KTGS - (distance_TS[:, None] * self._slope_KG[:, None, :, None]).to(wide)
        score_KTGS = score_KTGS.masked_fill(~seen_TS[:, None], -torch.inf)
        most_KTG = torch.maximum(self._most_KTG, score_KTGS.amax(-1))
        finite_KTG = most_KTG.nan_to_num(neginf=0.0)  # a query that has seen no key yet
        kept_KTG = torch.exp(self._most_KTG - finite_KTG)
        weight_KTGS = torch.exp(score_KTGS - finite_KTG[..., None])
        self._total_KTG = self._total_KTG * kept_KTG + weight_KTGS.sum(-1)
        mixed_KTGD = weight_KTGS @ value_SKD.to(wide).transpose(0, 1)[:, None]
        self._mixed_KTGD = self._mixed_KTGD * kept_KTG[..., None] + mixed_KTGD
        self._most_KTG = most_KTG

    def out(self) -> Tensor:
        """Return what the queries mix, [T, H, D]."""
        out_KTGD = self._mixed_KTGD / self._total_KTG[..., None]
        return out_KTGD.transpose(0, 1).flatten(1, 2).to(self._dtype)


def _name(layer: int) -> str:
    return f"layer {layer}'s keys and values"
