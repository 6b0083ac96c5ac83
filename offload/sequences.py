"""A batch of sequences whose keys and values stay in memory while they fit, and lie in a file beyond.

Which layers are moved away is the plan's matter. A layer that stays has a cache as the compiled path's sequences have;
one that is moved away is brought in for each sweep, whole, in the same form: what is computed with it is the same, to
the bit. Where not even one layer's fit, they are attended to block by block.

Shapes: B sequences, C capacity, K key/value heads, D head size, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..compiled.compute import accumulation_dtype
from ..compiled.layers import Cache
from ..spec.config import ModelConfig
from ..spec.errors import RequestError
from .copies import Copies, Inline
from .events import Event
from .kv_blocks import KvBlocks
from .kv_file import KvFile, writable_folder
from .kv_home import KvHome
from .kv_stream import KvStream, Place, Span, whole_capacity


class Away(NamedTuple):
    """What has no room in memory."""

    layers: Collection[int]
    block_tokens: int
    """Tokens that are brought in at a time; 0 where whole layers are."""
    dram: Collection[int] = ()
    """Those of the layers that lie in DRAM; the others lie in a file."""


class _Tiers:
    """Keys and values of all layers at one capacity: in memory, in DRAM, or in a file."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        tokens: int,
        compute: torch.dtype,
        away: Away,
        folder: Path,
        log: Callable[[Event], None],
        copies: Copies,
    ) -> None:
        self.capacity = max(2, tokens)  # a graph's S is at least 2, and it reads S slots
        if away.layers:
            self.capacity = whole_capacity((config.layers[index] for index in away.layers), tokens, compute)
        self.here: dict[int, Cache] = {}
        places: dict[int, Place] = {}
        offset = in_dram = 0
        for index in sorted(range(len(config.layers)), key=lambda each: each not in away.dram):
            attention = config.layers[index].attention
            place = Place(
                batch, self.capacity, attention.kv_heads, attention.head_size, compute, attention.window, offset
            )
            if index in away.layers:
                places[index] = place
                offset += place.nbytes
                in_dram += place.nbytes if index in away.dram else 0
            else:
                shape = batch * self.capacity, place.kv_heads, place.head_size
                self.here[index] = Cache(
                    *(torch.zeros(shape, dtype=compute, device=copies.device) for _ in Cache._fields)
                )
        self.away: KvStream | KvBlocks | None = None
        if places:
            file = KvFile(writable_folder(folder), offset - in_dram) if offset > in_dram else None
            home, blocks = KvHome(file, in_dram, copies), away.block_tokens
            self.away = KvBlocks(home, places, blocks, log, copies) if blocks else KvStream(home, places, log, copies)

    def get(self, layer: int, lengths: Sequence[int]) -> Cache:
        """Return a layer's keys and values, if need be in a buffer that the next call overwrites."""
        if layer in self.here:
            return self.here[layer]
        assert self.away is not None
        return self.away.get(layer, lengths)

    def put(self, layer: int, cache: Cache, capacity: int, lengths: Sequence[int]) -> None:
        """Take a layer's keys and values from a cache of another capacity."""
        if layer not in self.here:
            assert self.away is not None
            self.away.put(layer, cache, capacity, lengths)
            return
        for mine, given in zip(self.here[layer], cache, strict=True):
            for row, length in enumerate(lengths):
                start = row * self.capacity
                mine[start : start + length] = given[row * capacity : row * capacity + length]

    def close(self) -> None:
        self.here = {}
        if self.away is not None:
            self.away.close()


class TieredSequences:
    """Implements `twinfer.spec.decoder.Sequences` for the offloading path."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        reserve: int,
        compute: torch.dtype,
        away: Away,
        folder: Path,
        log: Callable[[Event], None],
        copies: Copies | None = None,
    ) -> None:
        """`folder` is where the file is made that holds what is away; `log` gets what is read and written.

        `copies` say on which device they are, the CPU unless given, and bring what is away there.
        """
        self.owner: object = None
        self._copies = copies or Inline()
        dtype = accumulation_dtype(compute)
        self.last_BV = torch.zeros(batch, config.vocabulary, dtype=dtype, device=self._copies.device)
        self._config, self._batch, self._compute, self._folder, self._log = config, batch, compute, folder, log
        self._tiers = self._made(reserve, away)
        self._lengths = [0] * batch
        self._closed = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    @property
    def capacity(self) -> int:
        return self._tiers.capacity

    def close(self) -> None:
        self._closed = True
        self._tiers.close()
        self.last_BV = self.last_BV[:0]

    def check_open(self) -> None:
        if self._closed:
            raise RequestError("the sequences are closed; open new ones")

    def make_room(self, longest: int, away_at: Callable[[int], Away]) -> None:
        """Let every sequence hold `longest` tokens: at least double the capacity, up to the context, and copy.

        `away_at` says what has to be away at a capacity.
        """
        if longest <= self.capacity:
            return
        capacity = min(max(longest, 2 * self.capacity), max(2, self._config.context))
        old, new = self._tiers, self._made(capacity, away_at(capacity))
        for layer in range(len(self._config.layers)):
            new.put(layer, old.get(layer, self._lengths), old.capacity, self._lengths)
            old.here.pop(layer, None)
        old.close()
        self._tiers = new

    @contextmanager
    def sweep(self, spans: Sequence[Span]) -> Iterator[None]:
        """Go through all layers in order, in which these sequences gain tokens; they are kept when it ends."""
        away = self._tiers.away
        if away is None:
            yield
            return
        try:
            rows: dict[int, Span] = {}
            for each in spans:  # pieces of a prompt follow each other
                first = rows.setdefault(each.row, each)
                rows[each.row] = Span(each.row, first.begin, each.end)
            if isinstance(away, KvStream):
                away.begin(list(rows.values()))
            yield
            away.end()
        finally:
            away.abandon()

    @contextmanager
    def layer(self, index: int) -> Iterator[Cache | KvBlocks]:
        """Hold a layer's cache, or what attends to it block by block, within a sweep."""
        here, away = self._tiers.here.get(index), self._tiers.away
        if here is not None:
            yield here
        elif isinstance(away, KvStream):
            with away.layer(index) as cache:
                yield cache
        else:
            assert away is not None
            yield away

    def advance(self, gained: list[int], last_BV: Tensor) -> None:
        """Record that sequences gained tokens, and the logits after their last ones."""
        self._lengths = [length + more for length, more in zip(self._lengths, gained, strict=True)]
        self.last_BV = last_BV

    def rewrite(self) -> None:
        """Write anew what lies in the file: pages that were never written are read without the disk."""
        for layer in range(len(self._config.layers)):
            if layer not in self._tiers.here:
                self._tiers.put(layer, self._tiers.get(layer, self._lengths), self.capacity, self._lengths)

    def _made(self, tokens: int, away: Away) -> _Tiers:
        return _Tiers(self._config, self._batch, tokens, self._compute, away, self._folder, self._log, self._copies)
