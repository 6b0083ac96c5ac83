"""The compiled path: a `Decoder` and `Encoder` whose every step is one call of a compiled graph.

Why it is faster: see `steps` (the graphs), `linear` and `packing` (what they read) and `attention` (the cache). This
file decides who runs in which graph. Sequences that gain one token run together, as a decode step; one that gains more
runs alone, as a prefill of at most 512 tokens at a time, which bounds the memory and needs no padding. A lone decode
step has its own graph, since one row is the case that memory alone limits. Texts that are encoded run together while
they hold no more than 512 tokens, one after the other in one row of tokens, which needs no padding either.

Shapes: B sequences, R of them that gain one token, T tokens, S key positions, V vocabulary, W table width, N texts.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import accumulate
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..spec import decoder as protocol
from ..spec.ambient import pinned
from ..spec.config import ModelConfig, Storage
from ..spec.errors import RequestError
from ..spec.weights import WeightSource
from .artifacts import KERNELS
from .cache_folder import use_private_cache
from .compute import COMPUTE_DTYPES, DEFAULT
from .examples import example
from .graph import DecodeGraphs, device_of_graphs
from .head import head_prefill, scale_and_cap
from .layers import Cache
from .linear import PASS_ROWS, passes
from .machine import check_compiler, checked_device
from .programs import Pieces, Program
from .routes import Routes
from .sequences import StaticSequences, runs
from .steps import Piece, decode_program, eager, encode_program, prefill_program
from .turn import Turn
from .weights import Model, prepare

_FIRST_SLOTS = 1024
"""Numbers of slots that are made at first; the table of them doubles when more are used."""

_PREFILL_TOKENS = 512
"""The longest piece of a prompt that is prefilled at once."""

_ENCODE_TOKENS = 512
"""As many tokens are encoded at once, or one text if it is longer."""

_DECODE = (Program.DECODE, Program.DECODE_ROWS, Program.DECODE_MANY)


class Mode(StrEnum):
    """How a path runs its programs."""

    COMPILED = "compiled"
    EAGER = "eager"
    """Operator by operator, as they are written."""
    GUARDED = "guarded"
    """Compiled, and with torch's guards at each call, which would show a program that fits only some sizes."""


class CompiledPath:
    """Implements `twinfer.spec.decoder.Decoder` and `Encoder`.

    Raises `MachineError` where there is no C++ compiler or no such device, `RequestError` for an unknown storage,
    compute dtype or mode, and what the source raises; all before the weights are read, the last excepted. Unless
    `captured` is false, decode steps that are compiled are captured and replayed (`graph`). `kernels` are options of
    Inductor other than `artifacts.KERNELS`, for a benchmark; no such program is kept on disk. `report` gets a line of
    text about whatever takes long. With `routes`, and only then, the path is `spec.decoder.Routed`.

    Several threads may use one path, each with sequences of its own: their calls wait for each other. A forked process
    has one thread: a path compiled for several before the fork raises `MachineError` there.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        storage: Storage | str = Storage.FLOAT32,
        compute: torch.dtype = DEFAULT,
        device: str | torch.device = "cpu",
        mode: Mode | str = Mode.COMPILED,
        captured: bool = True,
        kernels: Mapping[str, Any] = KERNELS,
        report: Callable[[str], None] | None = None,
        routes: bool = False,
    ) -> None:
        if storage not in list(Storage):
            raise RequestError(f"storage is {storage!r}; it must be one of {', '.join(Storage)}")
        if compute not in COMPUTE_DTYPES:
            raise RequestError(f"compute is {compute}; it must be one of {', '.join(map(str, COMPUTE_DTYPES))}")
        on = checked_device(device)
        _check_mode(mode, on)
        with pinned(on):
            model = prepare(source, Storage(storage), on, compute)
        self._begin(model, source.config, Mode(mode), captured, kernels, report, routes)

    @classmethod
    def from_model(
        cls,
        model: Model,
        config: ModelConfig,
        *,
        mode: Mode | str = Mode.COMPILED,
        captured: bool = True,
        kernels: Mapping[str, Any] = KERNELS,
        report: Callable[[str], None] | None = None,
        routes: bool = False,
    ) -> "CompiledPath":
        """Return a path of a model that is prepared already, and whole. Paths may share one."""
        if model.embedding is None or model.head is None:
            raise RequestError("the model lacks its embedding or its head; a path needs the whole model")
        _check_mode(mode, model.device)
        path = cls.__new__(cls)
        path._begin(model, config, Mode(mode), captured, kernels, report, routes)
        return path

    def _begin(
        self,
        model: Model,
        config: ModelConfig,
        mode: Mode,
        captured: bool,
        kernels: Mapping[str, Any],
        report: Callable[[str], None] | None,
        routes: bool,
    ) -> None:
        self._notes = Routes(model, config, noted=routes)
        if routes:
            self.routes = self._notes.begin(0)
        model = self.model = self._notes.model
        self._config, self._mode, self._kernels = config, mode, kernels
        self._storage, self._device, self._compute = model.storage, model.device, model.compute
        self._turn = Turn(model.device, compiled=mode is not Mode.EAGER)
        self._report = report or (lambda line: None)
        if mode is not Mode.EAGER:
            use_private_cache(self._report)
        with self._turn:
            self._slots = torch.arange(_FIRST_SLOTS, device=model.device)
        self._graphs: DecodeGraphs | None = None
        if captured and mode is not Mode.EAGER:
            self._graphs = DecodeGraphs(model, device_of_graphs(model.device), report=self._report)
        self._programs = {name: self._made(name) for name in self._names()}
        self._uncompiled = set() if mode is Mode.EAGER else set(self._programs)

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
    def weight_bytes(self) -> int:
        """Bytes of the prepared weights; a tied head counts once."""
        leaves = pytree.tree_leaves(self.model)
        storages = {each.untyped_storage() for each in leaves if isinstance(each, Tensor)}
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

    def compile(self, *, batches: bool = True) -> float:
        """Compile now what is not compiled yet, and return how many seconds it took; otherwise the first use does it.

        Afterwards no batch, length, capacity or growth compiles anything. Without `batches`, the graph in which
        several sequences gain a token together is left for later. A decoder that also encodes compiles that when it
        first does.
        """
        begin = time.perf_counter()
        later = {Program.ENCODE} if self._config.extensible else set()
        later |= set() if batches else {Program.DECODE_ROWS, Program.DECODE_MANY}
        with self._turn:
            for name in (each for each in self._programs if each not in later):
                self.program(name)
        return time.perf_counter() - begin

    def open(self, batch: int, reserve: int) -> StaticSequences:
        """Start `batch` empty sequences with room for `reserve` tokens each; all memory is taken here."""
        protocol.check_open(self._config, self.max_batch, batch, reserve)
        with self._turn:
            sequences = StaticSequences(self._config, batch, reserve, self._device, self._compute)
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
            if self._notes.noted:
                self.routes = self._notes.begin(len(tokens))
            gained = [len(each) for each in tokens]
            sequences.make_room(max(length + more for length, more in zip(lengths, gained, strict=True)))
            single = [index for index, more in enumerate(gained) if more == 1]
            logits_RV = sequences.last_BV[:0]
            if single:
                logits_RV = self._decode(sequences, single, [tokens[index][0] for index in single])
            if len(single) == len(gained):
                sequences.advance(gained, logits_RV)
                last_BV = logits_RV.clone()
                return [each_V[None] for each_V in last_BV.unbind()] if every_position else last_BV
            last_BV = sequences.last_BV.clone()
            last_BV[single] = logits_RV
            every = [last_BV[index : index + (more == 1)].clone() for index, more in enumerate(gained)]
            for index in (index for index, more in enumerate(gained) if more > 1):
                token_T = torch.tensor(tokens[index], device=self._device)
                last_BV[index], every[index] = self._prefill(sequences, index, token_T, every_position)
            sequences.advance(gained, last_BV)
            return every if every_position else last_BV.clone()

    def encode(self, tokens: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Hidden vectors of whole texts, of any lengths and number, as the protocol says."""
        protocol.check_encoding(self._config, tokens, types)
        hidden: list[Tensor] = []
        with self._turn:
            for run in runs([len(each) for each in tokens], _ENCODE_TOKENS):
                hidden += self._encode(tokens[run], None if types is None else types[run])
        return hidden

    def _encode(self, tokens: Sequence[Tensor], types: Sequence[Tensor] | None) -> list[Tensor]:
        """Texts in one run of the graph, which wants two tokens: a lone one is encoded twice."""
        lengths = [len(each) for each in tokens]
        lone = sum(lengths) == 1

        def joined(each: Sequence[Tensor]) -> Tensor:
            return torch.cat([one.detach().to(self._device, torch.int64) for one in each] * (2 if lone else 1))

        token_T = joined(tokens)
        type_T = torch.zeros_like(token_T) if types is None else joined(types)
        position_T = joined([self._slots_to(length) for length in lengths])
        cu_seqlens = torch.tensor([0, *accumulate(lengths * 2 if lone else lengths)])
        given = token_T, type_T if self._config.token_types else None, position_T, cu_seqlens
        hidden_TW = self.program(Program.ENCODE)(self._notes.unnoted, *given)
        return list(hidden_TW[: sum(lengths)].split(lengths))

    def _names(self) -> list[Program]:
        if not self._config.extensible:
            return [Program.ENCODE]
        many = [Program.DECODE_MANY] if self._storage is Storage.FLOAT32 else []  # `linear` says why
        return [Program.ENCODE, Program.PREFILL, Program.DECODE, Program.DECODE_ROWS, *many]

    def _made(self, name: Program) -> Callable[..., Any]:
        given = self._config, self._storage, self._pieces(name)
        match name:
            case Program.ENCODE:
                return encode_program(*given, compute=self._compute)
            case Program.PREFILL:
                return prefill_program(*given, compute=self._compute)
            case Program.DECODE | Program.DECODE_ROWS | Program.DECODE_MANY:
                return decode_program(*given, compute=self._compute, many=name is Program.DECODE_MANY)

    def _pieces(self, name: Program) -> Piece:
        """Return what makes the pieces of a program."""
        if self._mode is Mode.EAGER:
            return eager
        told = False

        def on_compile(reason: str) -> None:
            nonlocal told
            if not told:
                self._report(f"compiling {name} ({reason})")
            told = True

        described = f"{name} {self._storage} {self._compute} {self._config}{' routes' if self._notes.noted else ''}"
        return Pieces(described, on_compile, keep_guards=self._mode is Mode.GUARDED, kernels=self._kernels)

    def _decode(self, sequences: StaticSequences, rows: list[int], tokens: list[int]) -> Tensor:
        """One token for each of these sequences; logits [R, V].

        Rows go through their program in passes; a row that only fills one up is computed again, and writes into the
        cache once more what it has written.
        """
        logits = [
            self._decode_rows(sequences, [rows[each] for each in given], [tokens[each] for each in given])
            for given in passes(len(rows), self._storage)
        ]
        logits_RV = torch.cat(logits) if len(logits) > 1 else logits[0]
        return logits_RV if len(logits_RV) == len(rows) else logits_RV[: len(rows)]

    def _decode_rows(self, sequences: StaticSequences, rows: list[int], tokens: list[int]) -> Tensor:
        lengths, capacity = sequences.lengths, sequences.capacity
        positions = [lengths[row] for row in rows]
        step = tokens, positions, [row * capacity for row in rows]
        name = {1: Program.DECODE, PASS_ROWS: Program.DECODE_ROWS}.get(len(rows), Program.DECODE_MANY)
        program, longest = self.program(name), max(positions) + 1
        if self._graphs is not None:
            slot_S = self._slots_to(self._graphs.slots(longest, capacity))
            logits_RV = self._graphs.step(program, sequences.caches, step, slot_S)
        else:
            slot_S, step_3R = self._slots_to(max(2, longest)), torch.tensor(step, device=self._device)
            logits_RV = program(self.model, sequences.caches, step_3R, slot_S)
        self._notes.note_step(rows)
        return logits_RV

    def _slots_to(self, count: int) -> Tensor:
        """0 .. count - 1: the beginning of a table that doubles when it is too short; a context may be 2 ** 30."""
        if count > len(self._slots):
            self._slots = torch.arange(max(count, 2 * len(self._slots)), device=self._device)
        return self._slots[:count]

    def _prefill(
        self, sequences: StaticSequences, row: int, token_T: Tensor, every_position: bool
    ) -> tuple[Tensor, Tensor]:
        """Several tokens for one sequence, in even pieces; the last logits [V] and, if asked for, all [T, V]."""
        begin = sequences.lengths[row]
        start_1 = torch.tensor([row * sequences.capacity], device=self._device)
        program, logits_1V = self.program(Program.PREFILL), sequences.last_BV[:0]
        every: list[Tensor] = []
        for piece_T in token_T.tensor_split(-(-len(token_T) // _PREFILL_TOKENS)):
            end = begin + len(piece_T)
            slot_S = self._slots_to(end)
            position_T = slot_S[begin:]
            hidden_TW, logits_1V = program(self.model, sequences.caches, piece_T, position_T, start_1, slot_S)
            self._notes.note_tokens(row, len(piece_T))
            if every_position:
                assert self.model.head is not None
                logits_TV = head_prefill(hidden_TW.to(logits_1V.dtype), self.model.head.projection, self._storage)
                every.append(scale_and_cap(logits_TV, self._config.logit_scale, self._config.logit_softcap))
            begin = end
        return logits_1V[0], torch.cat(every) if every else logits_1V[:0]

    def program(self, name: Program) -> Callable[..., Any]:
        """Return a program, compiled; `steps` says what it takes."""
        program = self._programs[name]
        if name in self._uncompiled:
            model = self._notes.unnoted if name is Program.ENCODE else self.model
            arguments = example(name, model, self._config)
            program(*arguments)
            self._uncompiled.discard(name)
            if self._graphs is not None and name in _DECODE:
                self._check_graphs(self._graphs, program, *arguments)
        return program

    def _check_graphs(
        self,
        graphs: DecodeGraphs,
        program: Callable[..., Tensor],
        model: Model,
        caches: tuple[Cache, ...],
        step_3R: Tensor,
        slot_S: Tensor,
    ) -> None:
        """Do without graphs if a replay, on another step than the captured one, is not the plain call to the bit."""
        tokens, positions, starts = step_3R.tolist()
        graphs.step(program, caches, (tokens, positions, starts), slot_S)
        another, next_one = 1 % self._config.vocabulary, 1 % self._config.context  # the example's are 0
        later = [another for _ in tokens], [next_one for _ in positions], starts
        plain_RV = program(model, caches, torch.tensor(later, device=self._device), slot_S)
        replayed_RV = graphs.step(program, caches, later, slot_S)
        if not torch.equal(plain_RV.view(torch.int32), replayed_RV.view(torch.int32)):
            self._report("decoding without graphs: a replay differs from the plain call; is this torch supported?")
            self._graphs = None


def _check_mode(mode: Mode | str, device: torch.device) -> None:
    if mode not in list(Mode):
        raise RequestError(f"mode is {mode!r}; it must be one of {', '.join(Mode)}")
    if mode != Mode.EAGER:
        check_compiler(device)
