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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..compiled.compute import DEFAULT
from ..compiled.layers import Cache
from ..compiled.linear import PASS_ROWS, passes
from ..compiled.machine import bound_freed_memory, check_compiler, return_freed_memory
from ..compiled.path import Mode
from ..compiled.programs import Pieces, Program
from ..compiled.sequences import StaticSequences
from ..compiled.steps import Piece, eager
from ..compiled.turn import Turn
from ..spec import decoder as protocol
from ..spec.ambient import CPU
from ..spec.config import ModelConfig, Storage
from ..spec.errors import CheckpointError, RequestError
from .calls import Call, Pending, StreamedProgram, in_sweeps, streamed_program
from .direct import DirectFile, aligned_buffer
from .events import Event
from .expert_cache import ExpertCache
from .expert_report import ExpertReport
from .form import Resident, faulty, in_buffer
from .kv_stream import Span, away_layers
from .plan import PREFILL_TOKENS, Plan, call_bytes, most_batch, plan
from .sequences import Away, TieredSequences
from .store import Store
from .streamer import KEPT, Streamer, damaged
from .table import DiskTable

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""A store's norms and biases are float32, so it does not serve float64."""


class OffloadPath:
    """Implements `twinfer.spec.decoder.Decoder` for a store, on the CPU.

    `budget` bounds in bytes what it allocates; `open` decides how (`plan`) and refuses what does not fit. Raises
    `RequestError` for an unknown compute dtype or mode, `MachineError` where there is no C++ compiler, and
    `CheckpointError` where the store is damaged. `report` gets a line of text about whatever takes long, and says where
    the file system knows no direct reads.
    """

    def __init__(
        self,
        store: Store,
        config: ModelConfig,
        *,
        budget: int,
        compute: torch.dtype = DEFAULT,
        mode: Mode | str = Mode.COMPILED,
        report: Callable[[str], None] | None = None,
        direct: bool = True,
    ) -> None:
        if compute not in COMPUTE_DTYPES:
            raise RequestError(
                f"compute is {compute}; of a store it must be one of {', '.join(map(str, COMPUTE_DTYPES))}"
            )
        if mode not in list(Mode):
            raise RequestError(f"mode is {mode!r}; it must be one of {', '.join(Mode)}")
        if len(store.layers) != len(config.layers):
            raise CheckpointError(
                f"{store.folder} holds {len(store.layers)} layers; its config has {len(config.layers)}"
            )
        if mode != Mode.EAGER:
            check_compiler(CPU)
        self._store, self._config, self._budget, self._compute = store, config, budget, compute
        self._mode, self._report = Mode(mode), report or (lambda line: None)
        self._streamer: Streamer | None = None
        self._plan(batch=1, reserve=min(2, config.context))
        bound_freed_memory(budget)
        self._turn = Turn(CPU, compiled=self._mode is not Mode.EAGER)
        self._file = DirectFile(store.weights, direct=direct)
        if not self._file.direct:
            self._report(f"{store.weights} is read through the page cache: its file system knows no direct reads")
        self.resident = self._read_resident()
        checksum_B = self.resident.table_checksum_B
        self._table = DiskTable(self._file, store.table, store.storage, checksum_B)
        self._experts = ExpertCache(self._file, store, config) if any(store.experts) else None
        self._still = False
        self._kv_events: deque[Event] = deque(maxlen=KEPT)
        self.plan: Plan | None = None
        """That of the sequences opened last."""
        self._programs = {name: self._made(name) for name in self._names()}
        self._uncompiled = set() if self._mode is Mode.EAGER else set(self._programs)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def store(self) -> Store:
        return self._store

    @property
    def device(self) -> torch.device:
        return CPU

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
        self._table.close()
        self._file.close()

    def compile(self, *, batches: bool = True) -> float:
        """Compile now what is not compiled yet, and return how many seconds it took; otherwise the first use does it.

        Without `batches`, what only several sequences need is left for later.
        """
        begin_s = time.perf_counter()
        later = set() if batches else {Program.DECODE_ROWS, Program.DECODE_MANY}
        with self._turn:
            for name in [each for each in self._programs if each not in later]:
                self._program(name)
        return time.perf_counter() - begin_s

    def most_batch(self, reserve: int, *, away: bool = True) -> int:
        """Return how many sequences of so many tokens the budget has room for; `away`: with caches in a file."""
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
            away, folder = self._away(self.plan), self._store.folder
            sequences = TieredSequences(
                self._config, batch, reserve, self._compute, away, folder, self._kv_events.append
            )
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
            single = [row for row, more in enumerate(gained) if more == 1]
            pending = self._decode_calls(sequences, single, [tokens[row][0] for row in single])
            for row, more in enumerate(gained):
                if more > 1:
                    pending += self._prefill_calls(sequences, row, tokens[row])
            assert self.plan is not None
            last_BV = sequences.last_BV.clone()
            every: list[list[Tensor]] = [[] for _ in tokens]
            for together in in_sweeps(pending, self.plan.flight_bytes):
                self._sweep(sequences, together, every_position)
                for each in together:
                    self._take(each, last_BV, every if every_position else None)
            sequences.advance(gained, last_BV)
            if not every_position:
                return last_BV.clone()
            return [torch.cat(each) if each else last_BV[:0].clone() for each in every]

    def _away(self, plan: Plan) -> Away:
        return Away(away_layers(len(self._config.layers), plan.away_layers), plan.block_tokens)

    def _grown(self, batch: int, capacity: int) -> Away:
        """Return what has to be away once each sequence has room for so many tokens."""
        self.plan = self._plan(batch, capacity)
        self._make_room(self.plan)
        return self._away(self.plan)

    def _plan(self, batch: int, reserve: int) -> Plan:
        """Plan with the ring that is there, or where that leaves too little with a smaller one."""
        given: dict[str, Any] = {"budget": self._budget, "batch": batch, "reserve": reserve, "compute": self._compute}
        given["expands"] = self._mode is Mode.EAGER
        if self._streamer is not None:
            with contextlib.suppress(RequestError):
                made = plan(self._store, self._config, **given, slots=self._streamer.slots)
                if not made.block_tokens:
                    return made
        return plan(self._store, self._config, **given)

    def _make_room(self, made: Plan) -> None:
        """Have as many buffers for layers, and slots for experts, as are planned."""
        if self._streamer is not None and self._streamer.slots != made.slots:
            self._streamer.close()
            self._streamer = None
        if self._streamer is None:
            self._streamer = Streamer(self._file, self._store.schedule, made.slots)
        if self._experts is not None:
            self._experts.resize(kept=made.experts_kept, spare=made.experts_spare)

    def _read_resident(self) -> Resident:
        record = self._store.resident
        buffer = aligned_buffer(record.nbytes)
        self._file.read_into(buffer, record.offset, record.name)
        if fault := faulty(record, buffer):
            raise damaged(self._file, record, fault)
        resident: Resident = in_buffer(record, buffer)
        return resident

    def _names(self) -> list[Program]:
        many = [Program.DECODE_MANY] if self._store.storage is Storage.FLOAT32 else []
        return [Program.PREFILL, Program.DECODE, Program.DECODE_ROWS, *many]

    def _made(self, name: Program) -> StreamedProgram:
        described = f"{name} {self._store.storage} {self._compute} {self._config}"
        layers = self._pieces(name, described)  # described as the compiled path's are: they are the same pieces
        others = self._pieces(name, f"streamed {described}")
        return streamed_program(name, self._config, self._store.storage, self._compute, layers, others)

    def _pieces(self, name: Program, described: str) -> Piece:
        if self._mode is Mode.EAGER:
            return eager

        def on_compile(reason: str) -> None:
            self._report(f"compiling {name} ({reason})")

        return Pieces(described, on_compile, keep_guards=self._mode is Mode.GUARDED)

    def _program(self, name: Program) -> StreamedProgram:
        """Return a program, compiled: its pieces have met an example of each different layer."""
        program = self._programs[name]
        if name in self._uncompiled:
            self._compile(name, program)
            self._uncompiled.discard(name)
        return program

    def _compile(self, name: Program, program: StreamedProgram) -> None:
        """Run each piece on an example, whose dynamic dims differ in size from each other."""
        rows = {Program.DECODE_ROWS: PASS_ROWS, Program.DECODE_MANY: PASS_ROWS + 2}.get(name, 1)
        tokens, slots, capacity = 160, 224, 352
        different = dict.fromkeys(self._config.layers)
        part = replace(self._config, layers=tuple(different))
        caches = StaticSequences(part, rows, capacity, CPU, self._compute).caches
        start_R, slot_S = torch.arange(rows) * capacity, torch.arange(slots)
        table, _ = self._table.rows([row * len(self._store.table) for row in range(20)])
        if name is Program.PREFILL:
            token_T, position_T = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens) % self._config.context
            call = Call(program, (token_T, position_T, start_R, slot_S), last_only=True)
        else:
            step_3R = torch.stack([0 * start_R, 0 * start_R, start_R])
            call = Call(program, (step_3R, slot_S), shared=(slot_S,), last_only=False)
        buffer = aligned_buffer(max(record.nbytes for record in self._store.schedule))
        call.enter(table, self.resident)
        for layer, cache in zip(different, caches, strict=True):
            index = self._config.layers.index(layer)
            record = self._store.layers[index]
            self._file.read_into(buffer[: record.nbytes], record.offset, record.name)
            weights = in_buffer(record, buffer)
            if self._experts is not None:
                weights = self._experts.attached(index, weights, example=True)
            call.layer(layer, weights, cache, self.resident.rotations.of_layer[index])
        call.leave(self.resident)
        record = self._store.head[0]
        self._file.read_into(buffer[: record.nbytes], record.offset, record.name)
        call.score(in_buffer(record, buffer))

    def _decode_calls(self, sequences: TieredSequences, rows: list[int], tokens: list[int]) -> list[Pending]:
        """Return the passes of a decode step, in which rows run out as in the compiled path."""
        pending = []
        for given in passes(len(rows), self._store.storage) if rows else []:
            of_pass = [rows[each] for each in given]
            positions = [sequences.lengths[row] for row in of_pass]
            starts = [row * sequences.capacity for row in of_pass]
            ids = [tokens[each] for each in given]
            name = {1: Program.DECODE, PASS_ROWS: Program.DECODE_ROWS}.get(len(given), Program.DECODE_MANY)
            slot_S = torch.arange(max(2, max(positions) + 1))
            inputs = torch.tensor([ids, positions, starts]), slot_S
            call = Call(self._program(name), inputs, shared=(slot_S,), last_only=False)
            spans = [Span(row, sequences.lengths[row], sequences.lengths[row] + 1) for row in dict.fromkeys(of_pass)]
            nbytes = call_bytes(self._config, len(given), len(slot_S))
            pending.append(Pending(call, ids, of_pass, spans, True, nbytes))
        return pending

    def _prefill_calls(self, sequences: TieredSequences, row: int, tokens: list[int]) -> list[Pending]:
        """Return the pieces of a prompt, which go through each layer one after the other."""
        program, pending = self._program(Program.PREFILL), []
        end, stop = sequences.lengths[row], sequences.lengths[row] + len(tokens)
        start_1 = torch.tensor([row * sequences.capacity])
        for piece_T in torch.tensor(tokens).tensor_split(-(-len(tokens) // PREFILL_TOKENS)):
            begin, end = end, end + len(piece_T)
            slot_S = torch.arange(end)
            call = Call(program, (piece_T, slot_S[begin:], start_1, slot_S), last_only=True)
            nbytes = call_bytes(self._config, len(piece_T), end)
            pending.append(Pending(call, piece_T.tolist(), [row], [Span(row, begin, end)], end == stop, nbytes))
        return pending

    def _sweep(self, sequences: TieredSequences, pending: list[Pending], every_position: bool) -> None:
        """Take the calls through all layers and the head, in one pass over the store."""
        assert self._streamer is not None
        self._streamer.check_process()
        of_layer, layers = self.resident.rotations.of_layer, self._config.layers
        for each in pending:
            table, numbers = self._table.rows(each.tokens)
            each.call.enter(table, self.resident, numbers)
        spans = [span for each in pending for span in each.spans]
        with sequences.sweep(spans):
            for index, part in enumerate(self._parts()):
                if self._experts is not None and index < len(layers):
                    part = self._experts.attached(index, part, example=self._still)
                if index < len(layers):
                    with sequences.layer(index) as cache:
                        for each in pending:
                            if isinstance(cache, Cache):
                                each.call.layer(layers[index], part, cache, of_layer[index])
                            else:
                                attend = partial(cache.attend, index, part, layers[index].attention, each.spans)
                                each.call.layer_with(layers[index], part, attend, of_layer[index], self._store.storage)
                    if self._experts is not None:
                        return_freed_memory()  # copies of experts are large, and would lie between what stays
                if index == len(layers) - 1:
                    for each in pending:
                        each.call.leave(self.resident)
                if index >= len(layers):
                    for each in pending:
                        if each.last or every_position:
                            each.call.score(part, every=(self._config, self._store.storage) if every_position else None)

    def _parts(self) -> Iterator[Any]:
        assert self._streamer is not None
        if self._still:
            return self._streamer.still_sweep([*self._config.layers, *(0 for _ in self._store.head)])
        return self._streamer.sweep()

    def _take(self, done: Pending, last_BV: Tensor, every: list[list[Tensor]] | None) -> None:
        """Put a call's logits where they belong."""
        vocabulary = self._config.vocabulary
        if done.last:
            logits_RV = done.call.logits(vocabulary)
            last_BV[done.rows] = logits_RV
        if every is None:
            return
        if done.call.one_row_scored:
            every[done.rows[0]].append(done.call.every_logits(vocabulary))
        else:
            for place, row in enumerate(done.rows):
                every[row] = [logits_RV[place : place + 1].clone()]
