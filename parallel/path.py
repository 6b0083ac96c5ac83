"""One rank's end of a model on many ranks: a `Decoder` whose every call is made on all ranks, with equal arguments.

A call's work is cut into runs: sequences that gain one token go together, a prompt in pieces (`prompt_pieces`), shorter
than on the compiled path where they overlap. A run passes through the stages one after the other. Each stage does the
runs in the same order and sends on what it made without waiting for anyone, so a pipeline holds as many runs as it has
stages; `submit` only begins, and `collect` waits for the logits. Sequences are dealt to the data groups in turn, as in
the reference.

What it relies on: how many collectives a rank issues, and in what order, follows from the config and the tokens only.

Shapes: B sequences, R of them that gain one token, T tokens, N rows of results, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..compiled.compute import COMPUTE_DTYPES, DEFAULT, accumulation_dtype
from ..compiled.graph import DecodeGraphs, Step
from ..compiled.layers import Cache
from ..compiled.linear import PASS_ROWS
from ..compiled.machine import check_compiler
from ..compiled.moe import Moe
from ..compiled.path import Mode
from ..compiled.programs import Pieces, Program
from ..compiled.sequences import StaticSequences
from ..compiled.steps import Piece, eager
from ..compiled.turn import Turn
from ..spec import decoder as protocol
from ..spec.ambient import pinned
from ..spec.config import ModelConfig, Storage
from ..spec.errors import RequestError
from ..spec.moe import MoeConfig
from ..spec.parallel import check_parallel
from ..spec.weights import WeightSource
from .experts import ExpertPieces, expert_pieces, warm_up
from .programs import RankGraphs, RankProgram, Tokens, by_turns
from .runs import Run, runs_of, together
from .sequences import LocalSequences, ParallelSequences, Ticket
from .weights import Share, prepare_share
from .wire import Pending, Wire


class RankPath:
    """Implements `twinfer.spec.decoder.Decoder` together with the same object on every other rank.

    Raises `RequestError`, before weights are read, for a model that cannot be divided that way. `report` gets a line of
    text about whatever takes long; `on_step` is called after each layer and part of the weights, as a sign of life.
    """

    def __init__(
        self,
        source: WeightSource,
        wire: Wire,
        *,
        storage: Storage = Storage.FLOAT32,
        compute: torch.dtype = DEFAULT,
        device: torch.device,
        mode: Mode = Mode.COMPILED,
        report: Callable[[str], None] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        groups = wire.groups
        self._parallel, self._place = groups.parallel, groups.place
        check_parallel(source.config, self._parallel, storage)
        if compute not in COMPUTE_DTYPES:
            raise RequestError(f"compute is {compute}; it must be one of {', '.join(map(str, COMPUTE_DTYPES))}")
        if mode is not Mode.EAGER:
            check_compiler(device)
        self.wire = wire
        self._config, self._device, self._mode = source.config, device, mode
        self._report = report or (lambda line: None)
        self._on_step = on_step
        with pinned(device):
            self.share = self._prepared(source, storage, compute)
        self._storage, self._compute = storage, compute
        self._turn = Turn(device, compiled=mode is not Mode.EAGER)
        self._served = self._expert_pieces()
        self._graphs: dict[int | None, DecodeGraphs] | None = {} if self._records() else None
        """By how many rows of a step are of different sequences, None where all are."""
        self._programs = {name: self._made(name) for name in self._names()}
        self._uncompiled = set() if mode is Mode.EAGER else set(self._programs)

    def _prepared(self, source: WeightSource, storage: Storage, compute: torch.dtype) -> Share:
        """Return this rank's share of the weights."""
        wire, groups = self.wire, self.wire.groups
        return prepare_share(
            source,
            self._parallel,
            groups.rank,
            storage,
            self._device,
            compute,
            of_rows=lambda absmax_N: wire.largest(absmax_N, groups.tensor),
            of_expert_rows=lambda absmax_N: wire.largest(absmax_N, groups.slices),
            on_part=self._on_step,
        )

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def max_batch(self) -> int | None:
        return None

    @property
    def in_flight(self) -> int:
        """How many calls it has use for at a time: one for each stage."""
        return self._parallel.pipeline

    def compile(self, name: Program) -> None:
        """Compile a program, or load it, on this rank only; nothing is sent."""
        if name in self._uncompiled:
            with self._turn, self.wire.muted():
                self._try(name)
            self._uncompiled.discard(name)

    @property
    def uncompiled(self) -> list[Program]:
        """The programs that are not compiled yet, in the order in which all ranks compile them."""
        return [name for name in self._programs if name in self._uncompiled]

    def open(self, batch: int, reserve: int) -> ParallelSequences:
        protocol.check_open(self._config, self.max_batch, batch, reserve)
        with self._turn:
            return ParallelSequences(self, batch, self._opened(batch, reserve))

    def _opened(self, batch: int, reserve: int) -> LocalSequences:
        """Return those of a batch that the data group has, with what this rank holds of them."""
        own = len(range(self._place.data, batch, self._parallel.data))
        return StaticSequences(self.share.config, own, reserve, self._device, self._compute)

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
        """Append tokens and return the logits that follow, as the protocol says: the same bits on every rank."""
        return self.collect(self.submit(sequences, new_tokens, every_position=every_position))

    def submit(
        self, sequences: protocol.Sequences, new_tokens: Sequence[Tensor], *, every_position: bool = False
    ) -> Ticket:
        """Do this rank's part of an extension, and begin to receive the logits."""
        if not isinstance(sequences, ParallelSequences) or sequences.owner is not self:
            raise RequestError("the sequences were opened by another path; open them with this one")
        sequences.check_open()
        tokens = protocol.checked_tokens(self._config, sequences.lengths, new_tokens)
        gained = [len(each) for each in tokens]
        parallel = self._parallel
        with self._turn:
            logits = self._run_all(sequences, tokens, every_position)
            pending = []
            for group in range(parallel.data):
                own = range(group, len(gained), parallel.data)
                rows = sum(gained[index] if every_position else gained[index] > 0 for index in own)
                pending.append(self._handed_out(group, rows, logits))
        sequences.advance(gained)
        return Ticket(sequences, gained, every_position, pending)

    def collect(self, ticket: Ticket) -> Tensor | list[Tensor]:
        """Wait for the logits of a call that was submitted; calls are collected in the order of their submission."""
        sequences, gained = ticket.sequences, ticket.gained
        every = [self._nothing() for _ in gained]
        with self._turn:
            for group, pending in enumerate(ticket.pending):
                logits_NV = self.wire.waited(pending)
                own = [index for index in range(group, len(gained), self._parallel.data) if gained[index]]
                sizes = [gained[index] if ticket.every_position else 1 for index in own]
                for index, logits_TV in zip(own, torch.split(logits_NV, sizes), strict=True):
                    every[index] = logits_TV
                    sequences.last[index] = logits_TV[-1].clone()
        if ticket.every_position:
            return [each_TV.clone() for each_TV in every]
        return torch.stack([last_V for last_V in sequences.last if last_V is not None])

    def _handed_out(self, group: int, rows: int, logits: list[Tensor]) -> Pending:
        """Begin to give every rank the logits that the last stage of a data group has, [N, V]."""
        parallel = self._parallel
        mine = (self._place.stage, self._place.data) == (parallel.pipeline - 1, group)
        if not rows:
            return Pending(self._nothing(), None)
        logits_NV = torch.cat(logits) if mine else self._nothing(rows)
        if parallel.pipeline == parallel.data == 1:
            return Pending(logits_NV, None)
        source = (parallel.pipeline - 1) * parallel.stage_ranks + group * parallel.tensor
        return self.wire.start_broadcast(logits_NV, source)

    def _nothing(self, rows: int = 0) -> Tensor:
        return torch.zeros(rows, self._config.vocabulary, dtype=accumulation_dtype(self._compute), device=self._device)

    def _run_all(self, sequences: ParallelSequences, tokens: list[list[int]], every_position: bool) -> list[Tensor]:
        """Do the runs of this rank's data group; returns logits in the order of its sequences, on the last stage."""
        gained = [len(each) for each in tokens[self._place.data :: self._parallel.data]]
        found: dict[int, list[Tensor]] = {index: [] for index, more in enumerate(gained) if more}
        for run, logits in self._done(sequences, tokens, every_position):
            if logits is None:
                continue
            if run.program is Program.PREFILL:
                found[run.members[0]].append(logits)
            else:
                for index, logits_V in zip(dict.fromkeys(run.members), logits, strict=True):
                    found[index].append(logits_V[None])
        return [each for index in sorted(found) for each in found[index]]

    def _done(
        self, sequences: ParallelSequences, tokens: list[list[int]], every_position: bool
    ) -> Iterator[tuple[Run, Tensor | None]]:
        """Do the runs one after the other; yields each with its logits, where this rank has them."""
        group, groups, local = self._place.data, self._parallel.data, sequences.local
        lengths, own = sequences.lengths[group::groups], tokens[group::groups]
        assert isinstance(local, StaticSequences)
        local.make_room(max((length + len(each) for length, each in zip(lengths, own, strict=True)), default=0))
        runs = runs_of(lengths, own, self._storage, every_position, self._parallel)
        for each in together(runs, self._parallel):
            yield from zip(each, self._run(local, lengths, each, every_position), strict=True)
        for _ in range(len(runs), self._most_runs(sequences, tokens, every_position)):
            self._programs[Program.PREFILL].idle()

    def _most_runs(self, sequences: ParallelSequences, tokens: list[list[int]], every_position: bool) -> int:
        """Return how many runs any data group has, where groups exchange rows and so must have equally many; else 0."""
        parallel = self._parallel
        if parallel.data == 1 or parallel.expert * parallel.expert_slices == 1:
            return 0
        dealt = [slice(group, None, parallel.data) for group in range(parallel.data)]
        given = [(sequences.lengths[own], tokens[own]) for own in dealt]
        return max(len(runs_of(*each, self._storage, every_position, parallel)) for each in given)

    def _run(
        self, local: StaticSequences, lengths: Sequence[int], runs: list[Run], every_position: bool
    ) -> list[Tensor | None]:
        """Do a step, or prefill by turns; returns logits where this rank has them."""
        (run, *_), caches = runs, local.caches
        self._check_compiled(run.program)
        program = self._programs[run.program]
        if run.program is Program.PREFILL:
            results = by_turns(
                [
                    program.work(
                        caches,
                        self._tokens_of(local.capacity, lengths, each),
                        ends=each.ends,
                        every_position=every_position,
                    )
                    for each in runs
                ]
            )
        else:
            positions = [lengths[member] for member in run.members]
            starts = [member * local.capacity for member in run.members]
            step = [token for (token,) in run.tokens], positions, starts
            rows, longest = len(set(run.members)), max(positions) + 1
            filled = None if rows == len(starts) else rows
            results = [self._step(program, caches, step, filled, longest, local.capacity)]
        last = self._place.stage + 1 == self._parallel.pipeline
        return [result if last and each.ends else None for each, result in zip(runs, results, strict=True)]

    def _tokens_of(self, capacity: int, lengths: Sequence[int], run: Run) -> Tokens:
        starts = [member * capacity for member in run.members]
        if run.program is Program.PREFILL:
            (new,) = run.tokens
            positions = list(range(run.first, run.first + len(new)))
            slots, rows = run.first + len(new), len(new)
        else:
            new = [token for (token,) in run.tokens]
            positions = [lengths[member] for member in run.members]
            slots, rows = max(2, max(positions) + 1), len(set(run.members))
        token_T, position_T, start_T = map(self._as_tensor, (new, positions, starts))
        return Tokens(token_T, position_T, start_T, self._slots_to(slots), rows)

    def _step(
        self,
        program: RankProgram,
        caches: tuple[Cache, ...],
        step: Step,
        filled: int | None,
        longest: int,
        capacity: int,
    ) -> Tensor:
        call, graphs = program.step_of(filled), self._graphs
        if graphs is None:
            return call(self.share.model, caches, self._as_tensor(step), self._slots_to(max(2, longest)))
        if filled not in graphs:
            graphs[filled] = DecodeGraphs(self.share.model, RankGraphs(self.wire), report=self._report)
        slot_S = self._slots_to(graphs[filled].slots(longest, capacity))
        result = graphs[filled].step(call, caches, step, slot_S)
        self._on_step()
        return result

    def _as_tensor(self, numbers: Sequence[Any]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _slots_to(self, count: int) -> Tensor:
        return torch.arange(count, device=self._device)

    def _records(self) -> bool:
        """Return whether steps are recorded: compiled ones on a CPU."""
        return self._mode is not Mode.EAGER and self._device.type == "cpu"

    def _expert_pieces(self) -> dict[MoeConfig, ExpertPieces]:
        """Return what multiplies rows that arrive; nothing where no rows are exchanged."""
        if self._parallel.expert * self._parallel.expert_slices == 1:
            return {}
        mixtures = [layer.mlp for layer in self.share.config.layers if isinstance(layer.mlp, MoeConfig)]
        piece = self._piece("experts")
        return {config: expert_pieces(config, self._storage, piece) for config in dict.fromkeys(mixtures)}

    def _check_compiled(self, name: Program) -> None:
        if name in self._uncompiled:
            raise RequestError(f"the program {name} is not compiled; compile it on all ranks before it is used")

    def _names(self) -> list[Program]:
        many = [Program.DECODE_MANY] if self._storage is Storage.FLOAT32 else []
        return [Program.PREFILL, Program.DECODE, Program.DECODE_ROWS, *many]

    def _made(self, name: Program) -> RankProgram:
        return RankProgram(
            name, self.share, self._config.vocabulary, self.wire, self._piece(name), self._served, self._on_step
        )

    def _piece(self, name: str) -> Piece:
        if self._mode is Mode.EAGER:
            return eager
        told = False

        def on_compile(reason: str) -> None:
            nonlocal told
            if not told:
                self._report(f"compiling {name} for {self._parallel.ranks} ranks ({reason})")
            told = True

        described = f"{name} {self._storage} {self._compute} {self.share.config} of {self._parallel.tensor} ranks"
        return Pieces(described, on_compile, keep_guards=self._mode is Mode.GUARDED)

    def _try(self, name: Program) -> None:
        """Run a program on an example whose dynamic dims differ from each other in size, as the compiled path does."""
        for layer, weights in zip(self.share.config.layers, self.share.model.layers, strict=True):
            if layer.mlp in self._served and isinstance(weights.mlp, Moe):
                example_M = torch.zeros(self._config.hidden, dtype=self._compute, device=self._device)
                warm_up(weights.mlp, layer.mlp, self._served[layer.mlp], example_M, self.wire.groups)
        given, rows, capacity = self._example(name)
        local = StaticSequences(self.share.config, rows, capacity, self._device, self._compute)
        program = self._programs[name]
        if name is Program.PREFILL:
            program.run(local.caches, given)
            return
        step_3R = torch.stack((given.token_T, given.position_T, given.start_T))
        program.step_of(None)(self.share.model, local.caches, step_3R, given.slot_S)
        if self._graphs is not None:
            self._check_graphs(program, local, given.start_T.tolist())

    def _example(self, name: Program) -> tuple[Tokens, int, int]:
        """Return tokens to try a program on, for how many sequences they are, and of what capacity."""
        rows = {Program.DECODE_ROWS: PASS_ROWS, Program.DECODE_MANY: PASS_ROWS + 2}.get(name, 1)
        tokens, slots, capacity = 160, 224, 352
        count = tokens if name is Program.PREFILL else rows
        nothing_T = torch.zeros(count, dtype=torch.int64, device=self._device)
        position_T = torch.arange(count, device=self._device) % self._config.context
        start_R = torch.arange(rows, device=self._device) * capacity
        return Tokens(nothing_T, position_T, start_R, self._slots_to(slots), count), rows, capacity

    def _check_graphs(self, program: RankProgram, local: StaticSequences, starts: list[int]) -> None:
        """Do without graphs if a replay, on another step than the recorded one, is not the plain call to the bit."""
        tried = [None, *range(1, PASS_ROWS)] if len(starts) == PASS_ROWS else [None]
        another, next_one = 1 % self._config.vocabulary, 1 % self._config.context
        rows = len(starts)
        first, later = ([0] * rows, [0] * rows, starts), ([another] * rows, [next_one] * rows, starts)
        for filled in tried:
            given = filled, next_one + 1, local.capacity
            self._step(program, local.caches, first, *given)
            assert self._graphs is not None
            slot_S = self._slots_to(self._graphs[filled].slots(next_one + 1, local.capacity))
            plain = program.step_of(filled)(self.share.model, local.caches, self._as_tensor(later), slot_S)
            if not torch.equal(
                plain.view(torch.uint8), self._step(program, local.caches, later, *given).view(torch.uint8)
            ):
                self._report("decoding without graphs: a replay differs from the plain call; is this torch supported?")
                self._graphs = None
                return
