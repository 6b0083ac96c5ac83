"""The offloading path: a `Decoder` whose weights stay on the disk and pass through memory once a step.

Why it is possible: a step reads every weight once, in an order that is known, so the next layers are read from the disk
while one is computed with (`streamer`); and all sequences and all pieces of their prompts go through a layer while it
is there (`calls`). A step takes as long as the slower of the two. Logits are those of the compiled path, to the bit,
where that is so for products of rows of the head: in float32 on processors with AVX-512, and for decode steps in packed
storages everywhere.

Shapes: B sequences, R of them that gain one token, T tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor

from ..compiled.compute import DEFAULT
from ..compiled.linear import PASS_ROWS, passes
from ..compiled.machine import check_compiler, return_freed_memory
from ..compiled.path import Mode
from ..compiled.programs import Pieces, Program
from ..compiled.sequences import StaticSequences
from ..compiled.steps import Piece, eager
from ..compiled.turn import Turn
from ..spec import decoder as protocol
from ..spec.ambient import CPU
from ..spec.config import ModelConfig, Storage
from ..spec.errors import CheckpointError, RequestError
from .calls import Call, StreamedProgram, streamed_program
from .direct import DirectFile, aligned_buffer
from .events import Event
from .expert_cache import ExpertCache
from .expert_report import ExpertReport
from .form import Resident, faulty, in_buffer
from .plan import PREFILL_TOKENS, Plan, call_bytes, most_batch, plan
from .store import Store
from .streamer import Streamer, damaged
from .table import DiskTable

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""A store's norms and biases are float32, so it does not serve float64."""


@dataclass(slots=True)
class _Pending:
    """A call and where its logits belong."""

    call: Call
    tokens: list[int]
    rows: list[int]
    """The sequences; of a decode step, those of its rows, the rows that fill it up excepted."""
    last: bool
    """Whether it is the last piece of its prompt, or a decode step."""
    nbytes: int


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
        self._plan(batch=1, reserve=min(2, config.context))
        self._turn = Turn(CPU, compiled=self._mode is not Mode.EAGER)
        self._file = DirectFile(store.weights, direct=direct)
        if not self._file.direct:
            self._report(f"{store.weights} is read through the page cache: its file system knows no direct reads")
        self.resident = self._read_resident()
        checksum_B = self.resident.table_checksum_B
        self._table = DiskTable(self._file, store.table, store.storage, checksum_B)
        self._experts = ExpertCache(self._file, store, config) if any(store.experts) else None
        self._streamer: Streamer | None = None
        self.plan: Plan | None = None
        """That of the sequences opened last."""
        self._programs: dict[Program, StreamedProgram] = {}
        self._uncompiled: set[Program] = set()
        for name in self._names():
            self._programs[name] = self._made(name)
        if self._mode is not Mode.EAGER:
            self._uncompiled = set(self._programs)

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def device(self) -> torch.device:
        return CPU

    @property
    def max_batch(self) -> int | None:
        return None

    @property
    def events(self) -> list[Event]:
        """What the streamer did of late."""
        return [] if self._streamer is None else self._streamer.events

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

    def most_batch(self, reserve: int) -> int:
        """Return how many sequences of so many tokens the budget has room for."""
        expands = self._mode is Mode.EAGER
        given = self._store, self._config
        return most_batch(*given, budget=self._budget, reserve=reserve, compute=self._compute, expands=expands)

    def open(self, batch: int, reserve: int) -> StaticSequences:
        """Start `batch` empty sequences with room for `reserve` tokens each, if the budget has that room."""
        protocol.check_open(self._config, self.max_batch, batch, reserve)
        self.plan = self._plan(batch, reserve)
        with self._turn:
            if self._streamer is None:
                self._streamer = Streamer(self._file, self._store.schedule, self.plan.slots)
            if self._experts is not None:
                self._experts.resize(kept=self.plan.experts_kept, spare=self.plan.experts_spare)
            sequences = StaticSequences(self._config, batch, reserve, CPU, self._compute)
        sequences.owner = self
        return sequences

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
        if not isinstance(sequences, StaticSequences) or sequences.owner is not self:
            raise RequestError("the sequences were opened by another path; open them with this one")
        sequences.check_open()
        lengths = sequences.lengths
        tokens = protocol.checked_tokens(self._config, lengths, new_tokens)
        with self._turn:
            gained = [len(each) for each in tokens]
            sequences.make_room(max(length + more for length, more in zip(lengths, gained, strict=True)))
            single = [row for row, more in enumerate(gained) if more == 1]
            pending = self._decode_calls(sequences, single, [tokens[row][0] for row in single])
            for row, more in enumerate(gained):
                if more > 1:
                    pending += self._prefill_calls(sequences, row, tokens[row])
            last_BV = sequences.last_BV.clone()
            every: list[list[Tensor]] = [[] for _ in tokens]
            for together in self._sweeps(pending):
                self._sweep(sequences, together, every_position)
                for each in together:
                    self._take(each, last_BV, every if every_position else None)
            sequences.advance(gained, last_BV)
            if not every_position:
                return last_BV.clone()
            return [torch.cat(each) if each else last_BV[:0].clone() for each in every]

    def _plan(self, batch: int, reserve: int) -> Plan:
        streamer = getattr(self, "_streamer", None)
        return plan(
            self._store,
            self._config,
            budget=self._budget,
            batch=batch,
            reserve=reserve,
            compute=self._compute,
            expands=self._mode is Mode.EAGER,
            slots=None if streamer is None else streamer.slots,
        )

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

    def _decode_calls(self, sequences: StaticSequences, rows: list[int], tokens: list[int]) -> list[_Pending]:
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
            pending.append(_Pending(call, ids, of_pass, True, call_bytes(self._config, len(given), len(slot_S))))
        return pending

    def _prefill_calls(self, sequences: StaticSequences, row: int, tokens: list[int]) -> list[_Pending]:
        """Return the pieces of a prompt, which go through each layer one after the other."""
        program, pending = self._program(Program.PREFILL), []
        end, stop = sequences.lengths[row], sequences.lengths[row] + len(tokens)
        start_1 = torch.tensor([row * sequences.capacity])
        for piece_T in torch.tensor(tokens).tensor_split(-(-len(tokens) // PREFILL_TOKENS)):
            begin, end = end, end + len(piece_T)
            slot_S = torch.arange(end)
            call = Call(program, (piece_T, slot_S[begin:], start_1, slot_S), last_only=True)
            nbytes = call_bytes(self._config, len(piece_T), end)
            pending.append(_Pending(call, piece_T.tolist(), [row], end == stop, nbytes))
        return pending

    def _sweeps(self, pending: list[_Pending]) -> Iterator[list[_Pending]]:
        """Yield calls that go through the layers together: as many as the plan has room for, at least one."""
        assert self.plan is not None
        together: list[_Pending] = []
        for each in pending:
            if together and sum(one.nbytes for one in together) + each.nbytes > self.plan.flight_bytes:
                yield together
                together = []
            together.append(each)
        if together:
            yield together

    def _sweep(self, sequences: StaticSequences, pending: list[_Pending], every_position: bool) -> None:
        """Take the calls through all layers and the head, in one pass over the store."""
        assert self._streamer is not None
        self._streamer.check_process()
        of_layer, layers = self.resident.rotations.of_layer, self._config.layers
        for each in pending:
            table, numbers = self._table.rows(each.tokens)
            each.call.enter(table, self.resident, numbers)
        for index, part in enumerate(self._streamer.sweep()):
            if self._experts is not None and index < len(layers):
                part = self._experts.attached(index, part)
            for each in pending:
                if index < len(layers):
                    each.call.layer(layers[index], part, sequences.caches[index], of_layer[index])
                    if self._experts is not None:
                        return_freed_memory()  # copies of experts are large, and would lie between what stays
                    if index == len(layers) - 1:
                        each.call.leave(self.resident)
                elif each.last or every_position:
                    every = (self._config, self._store.storage) if every_position else None
                    each.call.score(part, every=every)

    def _take(self, done: _Pending, last_BV: Tensor, every: list[list[Tensor]] | None) -> None:
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
