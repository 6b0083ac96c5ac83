"""The programs of a store: made at once, compiled when first needed, by an example of each different layer.

What a piece is compiled for is what it meets in a sweep: weights that lie in a buffer, rows of the table from the disk,
and a block of the head.

Shapes: R sequences that gain one token, T prompt tokens of one sequence, S key positions.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..compiled.linear import PASS_ROWS
from ..compiled.path import Mode
from ..compiled.programs import Pieces, Program
from ..compiled.sequences import StaticSequences
from ..compiled.steps import Piece, eager
from ..spec.config import ModelConfig, Storage
from .calls import Call, StreamedProgram, streamed_program
from .cutting import feed_blocks
from .direct import DirectFile, aligned_buffer
from .expert_cache import ExpertCache
from .form import Record, Resident, in_buffer, on_device
from .store import Store
from .table import DiskTable


class Example(NamedTuple):
    """A model on the disk, from which programs get what they are compiled with."""

    store: Store
    config: ModelConfig
    compute: torch.dtype
    file: DirectFile
    table: DiskTable
    resident: Resident
    experts: ExpertCache | None
    device: torch.device


class StreamedPrograms:
    """The programs of one path. `report` gets a line of text about what is compiled."""

    def __init__(self, example: Example, mode: Mode, report: Callable[[str], None]) -> None:
        self.example = example
        self._mode, self._report = mode, report
        self._said: set[str] = set()
        many = [Program.DECODE_MANY] if example.store.storage is Storage.FLOAT32 else []
        names = [Program.PREFILL, Program.DECODE, Program.DECODE_ROWS, *many]
        self._programs = {name: self._made(name) for name in names}
        self._uncompiled = set() if mode is Mode.EAGER else set(names)

    def compile(self, later: Collection[Program] = ()) -> None:
        """Compile what is not compiled yet, but for some programs."""
        for name in self._programs:
            if name not in later:
                self.get(name)

    def get(self, name: Program) -> StreamedProgram:
        """Return a program, compiled: its pieces have met an example of each different layer."""
        program = self._programs[name]
        if name in self._uncompiled:
            self._compile(name, program)
            self._uncompiled.discard(name)
        return program

    def _made(self, name: Program) -> StreamedProgram:
        store, config, compute = self.example.store, self.example.config, self.example.compute
        described = f"{name} {store.storage} {compute} {config}"
        layers = self._pieces(name, described)  # described as the compiled path's are: they are the same pieces
        others = self._pieces(name, f"streamed {described}")
        return streamed_program(name, config, store.storage, compute, layers, others)

    def _pieces(self, name: Program, described: str) -> Piece:
        if self._mode is Mode.EAGER:
            return eager

        def on_compile(reason: str) -> None:
            line = f"compiling {name} ({reason})"
            if line not in self._said:  # a program is many pieces
                self._said.add(line)
                self._report(line)

        return Pieces(described, on_compile, keep_guards=self._mode is Mode.GUARDED)

    def _compile(self, name: Program, program: StreamedProgram) -> None:
        """Run each piece on an example, whose dynamic dims differ in size from each other."""
        store, config, compute, file, table_of, resident, experts, device = self.example
        rows = {Program.DECODE_ROWS: PASS_ROWS, Program.DECODE_MANY: PASS_ROWS + 2}.get(name, 1)
        tokens, slots, capacity = 160, 224, 352
        different = dict.fromkeys(config.layers)
        part = replace(config, layers=tuple(different))
        caches = StaticSequences(part, rows, capacity, device, compute).caches
        start_R, slot_S = torch.arange(rows, device=device) * capacity, torch.arange(slots, device=device)
        table, _ = table_of.rows([row * len(store.table) for row in range(20)])
        if name is Program.PREFILL:
            token_T = torch.zeros(tokens, dtype=torch.int64, device=device)
            position_T = torch.arange(tokens, device=device) % config.context
            call = Call(program, (token_T, position_T, start_R, slot_S), last_only=True)
        else:
            step_3R = torch.stack([0 * start_R, 0 * start_R, start_R])
            call = Call(program, (step_3R, slot_S), shared=(slot_S,), last_only=False)
        buffer = aligned_buffer(max(record.nbytes for record in store.schedule))

        def read(record: Record) -> Any:
            file.read_into(buffer[: record.nbytes], record.offset, record.name)
            return on_device(in_buffer(record, buffer), device)

        call.enter(table.to(device), resident)
        for layer, cache in zip(different, caches, strict=True):
            index = config.layers.index(layer)
            weights = read(store.layers[index])
            if experts is not None:
                weights = experts.attached(index, weights, example=True)
            call.layer(layer, weights, cache, resident.rotations.of_layer[index])
            if store.mlp[index][0]:
                records = (record for part in store.mlp[index] for record in part)
                feed_blocks(map(read, records), store.mlp[index], weights, [call])
        call.leave(resident)
        call.score(read(store.head[0]))
