"""One rank's end of a model on many ranks whose weights stay on the disk: each rank streams its own share.

It is `parallel.path.RankPath` with another loop. There a run (the rows of a step, or a piece of a prompt) goes through
all layers of a stage before the next one begins. Here all runs of a call go through a layer while its weights are
there, as in `path.OffloadPath`. What is computed for each run is the same, by the same pieces and collectives in the
same order: logits are those of the ranks that hold their weights, to the bit, where that is so of rows of the head
(`path`).

Ranks must agree. How many runs share a sweep follows from the plan, which is the same on all ranks of a stage: their
shares have the same form, and it is made for the largest part of a batch that any data group has.

Shapes: T tokens, W table width, V the rank's piece of the vocabulary.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..compiled.compute import DEFAULT, accumulation_dtype
from ..compiled.embedding import Embedding
from ..compiled.linear import lookup
from ..compiled.machine import bound_freed_memory, return_freed_memory
from ..compiled.packing import Matrix
from ..compiled.path import Mode
from ..compiled.programs import Program
from ..compiled.sequences import StaticSequences
from ..compiled.weights import Head, Model
from ..parallel.experts import warm_up
from ..parallel.path import RankPath
from ..parallel.programs import Tokens
from ..parallel.runs import Run, runs_of
from ..parallel.sequences import LocalSequences, ParallelSequences
from ..parallel.weights import Share, local_config
from ..parallel.wire import Wire
from ..spec.ambient import CPU
from ..spec.config import ModelConfig, Storage
from ..spec.moe import MoeConfig
from ..spec.parallel import check_parallel, stage_layers
from ..spec.shard import vocabulary_piece
from ..spec.weights import WeightSource
from .copies import copies_for
from .cutting import NO_MATRIX, feed_blocks
from .direct import DirectFile, aligned_buffer
from .dram import Dram
from .events import Event
from .expert_cache import ExpertCache
from .expert_report import ExpertReport
from .form import Record, in_buffer
from .gathering import GatheredStreamer, form_readers
from .kv_stream import Span, away_layers
from .opening import check_opening, read_resident
from .plan import Plan, call_bytes
from .rank_measuring import Job, computed_here
from .rank_program import Moving, StreamedRankProgram
from .rank_source import NoWeights
from .sequences import Away, TieredSequences
from .shares import Shares
from .store import check_device, kinds
from .streamer import KEPT, Streamer
from .table import DiskTable


class StreamedRankPath(RankPath):
    """Implements `twinfer.spec.decoder.Decoder` together with the same object on every other rank, for a store.

    `budget` bounds in bytes what this rank allocates, and `dram_budget` the memory in which records, or its parts of
    them, stay. Raises `RequestError` for a store of other degrees, and what
    `RankPath` and `OffloadPath` raise. Ranks that hold the same share read a part of each record each, and gather the
    rest from each other.
    """

    def __init__(
        self,
        shares: Shares,
        config: ModelConfig,
        wire: Wire,
        *,
        budget: int,
        dram_budget: int = 0,
        compute: torch.dtype = DEFAULT,
        mode: Mode = Mode.COMPILED,
        report: Callable[[str], None] | None = None,
        on_step: Callable[[], None] = lambda: None,
        direct: bool = True,
    ) -> None:
        groups, whole = wire.groups, next(iter(shares.stores.values()))
        check_opening(whole, config, compute, dram_budget)
        check_parallel(config, groups.parallel, shares.storage)
        self._store = shares.of_rank(groups.parallel, groups.rank)
        check_device(self._store, CPU)
        self._local = local_config(config, groups.parallel, groups.place.stage)
        self.job = Job(shares, config, groups.parallel, budget, dram_budget, compute, mode is Mode.EAGER)
        self._plan_of = partial(self.job.plan, groups.rank)
        self._plan_of(batch=1, reserve=min(2, config.context))
        bound_freed_memory(budget)
        self._file = DirectFile(self._store.weights, direct=direct)
        if not self._file.direct and report is not None:
            report(f"{self._store.weights} is read through the page cache: its file system knows no direct reads")
        self._readers = form_readers(groups)
        self._layers: Streamer | GatheredStreamer | None = None
        self._dram = Dram(copies_for(CPU))
        self._still = False
        self._kv_events: deque[Event] = deque(maxlen=KEPT)
        self.plan: Plan | None = None
        """That of the sequences opened last."""
        super().__init__(
            NoWeights(config),
            wire,
            storage=shares.storage,
            compute=compute,
            device=CPU,
            mode=mode,
            report=report,
            on_step=on_step,
        )
        self._table = DiskTable(self._file, self._store.table, self._store.storage, self._resident.table_checksum_B)
        self._experts = ExpertCache(self._file, self._store, self._local) if any(self._store.experts) else None

    @property
    def events(self) -> list[Event]:
        """What was read, written and computed with of late, on this rank."""
        streamed = [] if self._layers is None else self._layers.events
        return sorted([*streamed, *self._kv_events], key=lambda each: each.end_s)

    @property
    def layer_records(self) -> int:
        """How many records of a sweep are of layers; those of the head follow."""
        return len(self._store.schedule) - len(self._store.head)

    def close(self) -> None:
        """Give back threads, buffers and the file; sequences cannot be extended any more."""
        if self._layers is not None:
            self._layers.close()
        if self._experts is not None:
            self._experts.close()
        self._dram.want(())
        self._table.close()
        self._file.close()

    def measure(self, batch: int, reserve: int, tokens: int) -> list[list[int]]:
        """Compute a step, or prompts of so many tokens, with layers that stay; returns nanoseconds on all ranks.

        They are those of layers, the head, the rest, and of keys and values that are moved. All ranks call this.
        """
        return self.wire.all_numbers(computed_here(self, batch, reserve, tokens), self.wire.groups.world)

    def expert_counts(self) -> list[list[int]]:
        """Return what each rank read of experts (`RankReport`), since sequences were opened last. All call this."""
        report = ExpertReport() if self._experts is None else self._experts.report
        return self.wire.all_numbers(report.counts(), self.wire.groups.world)

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Compute with one layer of each kind in place of all, which stays: for seeing what computing takes."""
        self._still = True
        try:
            yield
        finally:
            self._still = False

    def _prepared(self, source: WeightSource, storage: Storage, compute: torch.dtype) -> Share:
        """Read what stays in memory."""
        parallel, place = self._parallel, self._place
        self._resident = resident = read_resident(self._file, self._store)
        self._on_step()
        beside = resident.projection, resident.position_PM, resident.type_YM, resident.embedding_norm
        layers = stage_layers(len(resident.rotations.of_layer), parallel.pipeline)[place.stage]
        rotations = resident.rotations
        model = Model(
            embedding=Embedding(NO_MATRIX, *beside) if place.stage == 0 else None,
            layers=(),
            rotations=rotations._replace(of_layer=rotations.of_layer[layers.start : layers.stop]),
            head=self._head(NO_MATRIX) if place.stage == parallel.pipeline - 1 else None,
            storage=storage,
            device=CPU,
            compute=compute,
        )
        tokens = vocabulary_piece(self._config.vocabulary, parallel.shard(self.wire.groups.rank))
        return Share(model, self._local, torch.tensor([tokens.start]), len(tokens))

    def _records(self) -> bool:
        """Return False: a layer's weights lie elsewhere each time."""
        return False

    def _made(self, name: Program) -> StreamedRankProgram:
        cut = {layer: None for layer, (ups, _) in zip(self._local.layers, self._store.mlp, strict=True) if ups}
        piece = self._piece(f"streamed {name}" if cut else name)
        given = self.share, self._config.vocabulary, self.wire, piece, self._served, self._on_step
        return StreamedRankProgram(name, *given, piece=piece, cut=cut)

    def _program(self, name: Program) -> StreamedRankProgram:
        program = self._programs[name]
        assert isinstance(program, StreamedRankProgram)
        return program

    def _head(self, block: Matrix) -> Head:
        return Head(self._resident.head_norm, self._resident.reduction, block)

    def _opened(self, batch: int, reserve: int) -> LocalSequences:
        self.plan = self._plan_of(batch=batch, reserve=reserve)
        self._make_room(self.plan)
        if self._experts is not None:
            self._experts.count_anew()
        own = len(range(self._place.data, batch, self._parallel.data))
        given = self._compute, self._away(self.plan), self._store.folder, self._kv_events.append
        return TieredSequences(self._local, own, reserve, *given)

    def _away(self, plan: Plan) -> Away:
        """Return whose keys and values lie in a file: of two neighbors that share a link each moves every other one."""
        layers = away_layers(len(self._local.layers), plan.away_layers, self.wire.groups.rank)
        return Away(layers, plan.block_tokens)

    def _make_room(self, made: Plan) -> None:
        if self._layers is not None and self._layers.slots != made.slots:
            self._layers.close()
            self._layers = None
        if self._layers is None:
            self._dram.want(made.dram_records)
            given = self._file, self._store.schedule, made.slots, self._dram
            alone = len(self._readers) == 1
            self._layers = Streamer(*given) if alone else GatheredStreamer(*given, self._readers, self.wire)
        if self._experts is not None:
            self._experts.resize(kept=made.experts_kept, spare=made.experts_spare)

    def _done(
        self, sequences: ParallelSequences, tokens: list[list[int]], every_position: bool
    ) -> Iterator[tuple[Run, Tensor | None]]:
        """Do the runs, several in each sweep through the layers."""
        group, groups, local = self._place.data, self._parallel.data, sequences.local
        assert isinstance(local, TieredSequences)
        gained = [len(each) for each in tokens]
        longest = max(length + more for length, more in zip(sequences.lengths, gained, strict=True))
        local.make_room(longest, lambda capacity: self._grown(len(tokens), capacity))
        sweeps = [self._sweeps(sequences, tokens, each, every_position) for each in range(groups)]
        most = max(map(len, sweeps)) if len(self._readers) > 1 or self._exchanges else len(sweeps[group])
        for together in (*sweeps[group], *[[]] * (most - len(sweeps[group]))):
            yield from self._swept(local, sequences.lengths[group::groups], together, every_position)
        local.advance(gained[group::groups], local.last_BV)

    @property
    def _exchanges(self) -> bool:
        """Whether data groups send rows to each other's experts."""
        return self._parallel.data > 1 and self._parallel.expert * self._parallel.expert_slices > 1

    def _sweeps(
        self, sequences: ParallelSequences, tokens: list[list[int]], group: int, every_position: bool
    ) -> list[list[Run]]:
        """Return the runs of a data group that go through the layers together; one where groups exchange rows."""
        assert self.plan is not None
        lengths, own = sequences.lengths[group :: self._parallel.data], tokens[group :: self._parallel.data]
        sweeps: list[list[Run]] = []
        left = 0
        for run in runs_of(lengths, own, self._storage, every_position, self._parallel):
            taken = sum(map(len, run.tokens))
            end = max(lengths[member] for member in run.members) + 1
            nbytes = call_bytes(
                self._store, self._local, taken, run.first + taken if run.program is Program.PREFILL else end
            )
            if not sweeps or nbytes > left or self._exchanges:
                sweeps.append([])
                left = self.plan.flight_bytes
            sweeps[-1].append(run)
            left -= nbytes
        return sweeps

    def _grown(self, batch: int, capacity: int) -> Away:
        """Return what has to be away once each sequence has room for so many tokens."""
        self.plan = self._plan_of(batch=batch, reserve=capacity)
        self._make_room(self.plan)
        return self._away(self.plan)

    def _swept(
        self, local: TieredSequences, lengths: Sequence[int], runs: list[Run], every_position: bool
    ) -> list[tuple[Run, Tensor | None]]:
        """Take runs through the stage's layers and the head, in one pass over the store."""
        moving = [self._entered(local.capacity, lengths, run) for run in runs]
        spans = [span for each in moving for span in each.spans]
        with local.sweep(spans), contextlib.closing(self._parts()) as parts:
            for index in range(len(self._local.layers)):
                self._pass(index, parts, local, moving)
            for part in parts:
                for each in moving:
                    if each.run.ends:
                        block = self._head(part)
                        each.scored.append(each.program.scored(each.x, block, each.tokens, every_position))
                self._on_step()
        return [(each.run, self._left(each)) for each in moving]

    def _parts(self) -> Generator[Any, None, None]:
        assert self._layers is not None
        still = kinds(self._store, self._local) if self._still else None
        parts = self._layers.sweep() if still is None else self._layers.still_sweep(still)
        while True:
            with self.wire.waiting():
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _entered(self, capacity: int, lengths: Sequence[int], run: Run) -> Moving:
        self._check_compiled(run.program)
        program, tokens = self._program(run.program), self._tokens_of(capacity, lengths, run)
        x = self._looked_up(program, tokens) if self._place.stage == 0 else program.received(tokens)
        return Moving(run, program, tokens, *program.enter(x, tokens), _spans(run, lengths))

    def _looked_up(self, program: StreamedRankProgram, tokens: Tokens) -> Tensor:
        """Return the tokens' rows of the table [T, W], of which each rank reads those of its piece."""
        first, width = int(self.share.first_token_1), self._config.table_width
        numbers = [token - first for token in tokens.token_T.tolist()]
        held = [place for place, number in enumerate(numbers) if 0 <= number < self.share.tokens]
        row_TW = torch.zeros(len(numbers), width, dtype=accumulation_dtype(self._compute))
        if held:
            table, places = self._table.rows([numbers[place] for place in held])
            row_TW[held] = lookup(torch.tensor(places), table, self._storage, width, row_TW.dtype)
        return program.reduced(row_TW, tokens)

    def _pass(self, index: int, parts: Iterator[Any], local: TieredSequences, moving: list[Moving]) -> None:
        """Take runs through a layer, whose records are the next ones."""
        weights, cut, layer = next(parts), self._store.mlp[index], self._local.layers[index]
        if self._experts is not None:
            weights = self._experts.attached(index, weights, example=self._still)
        with local.layer(index) as cache:
            for each in moving:
                each.layer(index, layer, weights, cache)
        if cut[0]:
            feed_blocks(parts, cut, weights, moving)
        if not moving and self._exchanges:
            self._programs[Program.PREFILL].idle_layer(index, weights)
        if self._experts is not None:
            return_freed_memory()  # copies of experts are large, and would lie between what stays

    def _left(self, done: Moving) -> Tensor | None:
        """Send a run on to the next stage, or return its logits."""
        if self._place.stage + 1 < self._parallel.pipeline:
            self.wire.send(done.x[: done.tokens.rows], self.wire.groups.neighbor(1))
            return None
        if not done.run.ends:
            return None
        return done.program.gathered(
            torch.cat(done.scored, 1)[:, : -(-self._config.vocabulary // self._parallel.tensor)]
        )

    def _try(self, name: Program) -> None:
        """Run each piece on an example."""
        given, rows, capacity = self._example(name)
        different = dict.fromkeys(self._local.layers)
        part = replace(self._local, layers=tuple(different))
        caches = StaticSequences(part, rows, capacity, CPU, self._compute).caches
        program = self._program(name)
        buffer = aligned_buffer(max(record.nbytes for record in self._store.schedule))

        def read(record: Record) -> Any:
            self._file.read_into(buffer[: record.nbytes], record.offset, record.name)
            return in_buffer(record, buffer)

        x = self._looked_up(program, given) if self._place.stage == 0 else program.received(given)
        moving = Moving(Run(name, [], [], 0, True), program, given, *program.enter(x, given))
        for layer, cache in zip(different, caches, strict=True):
            index = self._local.layers.index(layer)
            weights = read(self._store.layers[index])
            if self._experts is not None:
                weights = self._experts.attached(index, weights, example=True)
            if isinstance(layer.mlp, MoeConfig) and layer.mlp in self._served:
                example_M = torch.zeros(self._config.hidden, dtype=self._compute)
                warm_up(weights.mlp, layer.mlp, self._served[layer.mlp], example_M, self.wire.groups)
            moving.layer(index, layer, weights, cache)
            if self._store.mlp[index][0]:
                records = (record for part in self._store.mlp[index] for record in part)
                feed_blocks(map(read, records), self._store.mlp[index], weights, [moving])
        for record in self._store.head[:1]:
            program.scored(moving.x, self._head(read(record)), given, every_position=False)


def _spans(run: Run, lengths: Sequence[int]) -> list[Span]:
    """Return what the sequences of a run gain."""
    if run.program is Program.PREFILL:
        (row,) = run.members
        return [Span(row, run.first, run.first + len(run.tokens[0]))]
    return [Span(row, lengths[row], lengths[row] + 1) for row in dict.fromkeys(run.members)]
