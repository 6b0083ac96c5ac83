"""The offloading path: a `Decoder` whose weights stay on the disk and pass through memory once a step.

Why it is possible: a step reads every weight once, in an order that is known, so the next layers are read from the disk
while one is computed with (`streamer`); and all sequences and all pieces of their prompts go through a layer while it
is there (`calls`). A step takes as long as the slower of the two. Logits are those of the compiled path, to the bit,
where that is so for products of rows of the head: in float32 on processors with AVX-512, and for decode steps in packed
storages everywhere.

Shapes: B sequences, R of them that gain one token, T tokens, V vocabulary.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..compiled.compute import DEFAULT
from ..compiled.layers import Cache
from ..compiled.machine import bound_freed_memory, check_compiler, checked_device, return_freed_memory
from ..compiled.path import Mode
from ..compiled.programs import Program
from ..compiled.turn import Turn
from ..spec import decoder as protocol
from ..spec.ambient import CPU
from ..spec.config import ModelConfig
from ..spec.errors import RequestError
from .calls import Pending, in_sweeps
from .copies import copies_for
from .cutting import feed_blocks
from .direct import DirectFile
from .dram import Dram
from .events import Event
from .expert_cache import ExpertCache
from .expert_report import ExpertReport
from .form import on_device
from .kv_stream import away_layers
from .opening import check_opening, read_resident
from .passes import calls_of
from .plan import Plan, most_batch, plan
from .programs import Example, StreamedPrograms
from .sequences import Away, TieredSequences
from .store import Store, check_device, kinds
from .streamer import KEPT, Streamer
from .table import DiskTable


class OffloadPath:
    """Implements `twinfer.spec.decoder.Decoder` for a store, on the CPU or a GPU.

    `budget` bounds in bytes what it allocates on the device; `open` decides how (`plan`) and refuses what does not fit.
    `dram_budget` bounds what stays in the host's memory besides, from where it is copied instead of read from the disk.
    Raises `RequestError` for an unknown compute dtype or mode, `MachineError` where there is no such device or no C++
    compiler, and `CheckpointError` where the store is damaged, or for another type of device. `report` gets a line of
    text about whatever takes long, and says where the file system knows no direct reads.
    """

    def __init__(
        self,
        store: Store,
        config: ModelConfig,
        *,
        budget: int,
        dram_budget: int = 0,
        compute: torch.dtype = DEFAULT,
        device: str | torch.device = CPU,
        mode: Mode | str = Mode.COMPILED,
        report: Callable[[str], None] | None = None,
        direct: bool = True,
    ) -> None:
        check_opening(store, config, compute, dram_budget)
        if mode not in list(Mode):
            raise RequestError(f"mode is {mode!r}; it must be one of {', '.join(Mode)}")
        self._device = checked_device(device)
        check_device(store, self._device)
        if mode != Mode.EAGER:
            check_compiler(self._device)
        self._store, self._config, self._compute = store, config, compute
        self._budget, self._dram_budget = budget, dram_budget
        self._dram, self._kv_copies = Dram(copies_for(self._device)), copies_for(self._device)
        self._mode, self._report = Mode(mode), report or (lambda line: None)
        self._streamer: Streamer | None = None
        self._plan(batch=1, reserve=min(2, config.context))
        bound_freed_memory(budget)
        self._turn = Turn(self._device, compiled=self._mode is not Mode.EAGER)
        self._file = DirectFile(store.weights, direct=direct)
        if not self._file.direct:
            self._report(f"{store.weights} is read through the page cache: its file system knows no direct reads")
        self.resident = on_device(read_resident(self._file, store), self._device)
        checksum_B = self.resident.table_checksum_B
        self._table = DiskTable(self._file, store.table, store.storage, checksum_B)
        given = self._file, store, config
        self._experts = ExpertCache(*given, copies=copies_for(self._device)) if any(store.experts) else None
        self._still = False
        self._kv_events: deque[Event] = deque(maxlen=KEPT)
        self.plan: Plan | None = None
        """That of the sequences opened last."""
        parts = self._file, self._table, self.resident, self._experts, self._device
        example = Example(store, config, compute, *parts)
        self._programs = StreamedPrograms(example, self._mode, self._report)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def store(self) -> Store:
        return self._store

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def max_batch(self) -> int | None:
        return None

    @property
    def events(self) -> list[Event]:
        """What was read, written and computed with of late."""
        streamed = [] if self._streamer is None else self._streamer.events
        return sorted([*streamed, *self._kv_events], key=lambda each: each.end_s)

    @property
    def experts(self) -> ExpertReport | None:
        """What was read of experts since sequences were opened last; None for a model without."""
        return None if self._experts is None else self._experts.report

    def close(self) -> None:
        """Give back threads, buffers and the file; sequences cannot be extended any more."""
        if self._streamer is not None:
            self._streamer.close()
        if self._experts is not None:
            self._experts.close()
        self._dram.want(())
        self._table.close()
        self._file.close()

    def compile(self, *, batches: bool = True) -> float:
        """Compile now what is not compiled yet, and return how many seconds it took; otherwise the first use does it.

        Without `batches`, what only several sequences need is left for later.
        """
        begin_s = time.perf_counter()
        later = set() if batches else {Program.DECODE_ROWS, Program.DECODE_MANY}
        with self._turn:
            self._programs.compile(later)
        return time.perf_counter() - begin_s

    def most_batch(self, reserve: int, *, away: bool = True) -> int:
        """Return how many sequences of so many tokens the budget has room for; `away`: with caches beyond it."""
        given: dict[str, Any] = {"budget": self._budget, "reserve": reserve, "compute": self._compute, "away": away}
        return most_batch(self._store, self._config, **given, expands=self._mode is Mode.EAGER)

    def open(self, batch: int, reserve: int) -> TieredSequences:
        """Start `batch` empty sequences with room for `reserve` tokens each, if the budget has that room."""
        protocol.check_open(self._config, self.max_batch, batch, reserve)
        self.plan = self._plan(batch, reserve)
        with self._turn:
            self._make_room(self.plan)
            if self._experts is not None:
                self._experts.count_anew()
            away, log = self._away(self.plan), self._kv_events.append
            given = self._compute, away, self._store.folder, log, self._kv_copies
            sequences = TieredSequences(self._config, batch, reserve, *given)
        sequences.owner = self
        return sequences

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Compute with one layer of each kind in place of all, which stays: for seeing what computing takes."""
        self._still = True
        try:
            yield
        finally:
            self._still = False

    @overload
    def extend(
        self, sequences: protocol.Sequences, new_tokens: Sequence[Tensor], *, every_position: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def extend(
        self, sequences: protocol.Sequences, new_tokens: Sequence[Tensor], *, every_position: Literal[True]
    ) -> list[Tensor]: ...

    def extend(
        self, sequences: protocol.Sequences, new_tokens: Sequence[Tensor], *, every_position: bool = False
    ) -> Tensor | list[Tensor]:
        """Append tokens and return the logits that follow, as the protocol says."""
        if not isinstance(sequences, TieredSequences) or sequences.owner is not self:
            raise RequestError("the sequences were opened by another path; open them with this one")
        sequences.check_open()
        lengths = sequences.lengths
        tokens = protocol.checked_tokens(self._config, lengths, new_tokens)
        with self._turn:
            gained = [len(each) for each in tokens]
            longest = max(length + more for length, more in zip(lengths, gained, strict=True))
            sequences.make_room(longest, lambda capacity: self._grown(len(lengths), capacity))
            pending = calls_of(self._programs, sequences, tokens)
            assert self.plan is not None
            rows = list(range(len(tokens)))
            last_BV = sequences.last_BV if any(each.rows == rows for each in pending) else sequences.last_BV.clone()
            every: list[list[Tensor]] = [[] for _ in tokens]
            for together in in_sweeps(pending, self.plan.flight_bytes):
                self._sweep(sequences, together, every_position)
                for each in together:
                    last_BV = self._take(each, last_BV, every if every_position else None)
            sequences.advance(gained, last_BV)
            if not every_position:
                return last_BV.clone()
            return [torch.cat(each) if each else last_BV[:0].clone() for each in every]

    def _away(self, plan: Plan) -> Away:
        away = away_layers(len(self._config.layers), plan.away_layers)
        return Away(away, plan.block_tokens, plan.dram_caches)

    def _grown(self, batch: int, capacity: int) -> Away:
        """Return what has to be away once each sequence has room for so many tokens."""
        self.plan = self._plan(batch, capacity)
        self._make_room(self.plan)
        return self._away(self.plan)

    def _plan(self, batch: int, reserve: int) -> Plan:
        """Plan with the ring that is there, or where that leaves too little with a smaller one."""
        given: dict[str, Any] = {"budget": self._budget, "batch": batch, "reserve": reserve, "compute": self._compute}
        given |= {"expands": self._mode is Mode.EAGER, "dram_budget": self._dram_budget}
        given |= {"staged": self._dram.copies.staged}
        if self._streamer is not None:
            with contextlib.suppress(RequestError):
                made = plan(self._store, self._config, **given, slots=self._streamer.slots)
                if not made.block_tokens:
                    return made
        return plan(self._store, self._config, **given)

    def _make_room(self, made: Plan) -> None:
        """Have as many buffers for layers, and slots for experts, as are planned."""
        as_before = self._dram.tier.wanted == frozenset(made.dram_records)
        if self._streamer is not None and (self._streamer.slots != made.slots or not as_before):
            self._streamer.close()
            self._streamer = None
        if self._streamer is None:
            self._dram.want(made.dram_records)
            self._streamer = Streamer(self._file, self._store.schedule, made.slots, self._dram)
        if self._experts is not None:
            self._experts.resize(kept=made.experts_kept, spare=made.experts_spare, dram=made.dram_experts)

    def _sweep(self, sequences: TieredSequences, pending: list[Pending], every_position: bool) -> None:
        """Take the calls through all layers and the head, in one pass over the store."""
        assert self._streamer is not None
        self._streamer.check_process()
        layers = self._config.layers
        for each in pending:
            table, numbers = self._table.rows(each.tokens)
            each.call.enter(table.to(self._device), self.resident, numbers)
        spans = [span for each in pending for span in each.spans]
        with (
            sequences.sweep(spans),
            contextlib.closing(self._parts()) as parts,
        ):  # an error keeps this frame, and so the parts
            for index in range(len(layers)):
                self._layer(index, parts, sequences, pending)
            for each in pending:
                each.call.leave(self.resident)
            for block in parts:
                for each in pending:
                    if each.last or every_position:
                        each.call.score(block, every=(self._config, self._store.storage) if every_position else None)

    def _layer(self, index: int, parts: Iterator[Any], sequences: TieredSequences, pending: list[Pending]) -> None:
        """Take the calls through a layer, whose records are the next ones."""
        layer, place = self._config.layers[index], self.resident.rotations.of_layer[index]
        part = next(parts)
        if self._experts is not None:
            part = self._experts.attached(index, part, example=self._still)
        with sequences.layer(index) as cache:
            for each in pending:
                if isinstance(cache, Cache):
                    each.call.layer(layer, part, cache, place)
                else:
                    attend = partial(cache.attend, index, part, layer.attention, each.spans)
                    each.call.layer_with(layer, part, attend, place, self._store.storage)
        if self._experts is not None:
            return_freed_memory()  # copies of experts are large, and would lie between what stays
        if self._store.mlp[index][0]:
            feed_blocks(parts, self._store.mlp[index], part, [each.call for each in pending])

    def _parts(self) -> Generator[Any, None, None]:
        assert self._streamer is not None
        if self._still:
            return self._streamer.still_sweep(kinds(self._store, self._config))
        return self._streamer.sweep()

    def _take(self, done: Pending, last_BV: Tensor, every: list[list[Tensor]] | None) -> Tensor:
        """Put a call's logits where they belong; returns those of all sequences, uncopied where one call has them."""
        vocabulary = self._config.vocabulary
        if done.last:
            logits_RV = done.call.logits(vocabulary)
            if done.rows == list(range(len(last_BV))):
                last_BV = logits_RV
            else:
                last_BV[done.rows] = logits_RV
        if every is None:
            return last_BV
        if done.call.one_row_scored:
            every[done.rows[0]].append(done.call.every_logits(vocabulary))
        else:
            for place, row in enumerate(done.rows):
                every[row] = [logits_RV[place : place + 1].clone()]
        return last_BV
