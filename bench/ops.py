"""An op's implementations at one size and storage, timed in turn and judged on what was timed: rows."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..compiled import programs
from ..compiled.machine import return_freed_memory
from ..oracle.op import Function
from ..oracle.trial import Status, Trial, Verdict, leaves
from ..spec.config import Storage
from .columns import Arguments, Column, in_turn, moved, nbytes
from .compiling import Compile, Compiled, compile_program
from .limits import Probes, share_of_limit
from .machine import forget_peak, peak_resident_bytes, resident_bytes
from .preparing import Prepared
from .reasons import reason
from .rows import Accuracy, Kind, Limits, Machine, Row, written
from .settings import Setting, Shape
from .timing import Timing, interleave, paired_ratios, quantile, sample_of

EAGER = "eager"
"""The reference as it stands: what speed-ups are over."""
TORCH_COMPILE = "torch.compile"
"""The reference under torch.compile as it comes."""
MAX_AUTOTUNE = "max-autotune"
REDUCE_OVERHEAD = "reduce-overhead"
COMPILED = "compiled"
"""What the compiled path's graphs call, compiled as they are."""
IMPLEMENTATIONS = (EAGER, TORCH_COMPILE, MAX_AUTOTUNE, REDUCE_OVERHEAD, COMPILED)

_COMPILES: Mapping[str, Compile] = {
    TORCH_COMPILE: torch.compile,
    MAX_AUTOTUNE: lambda program: torch.compile(program, mode="max-autotune"),
    REDUCE_OVERHEAD: lambda program: torch.compile(program, mode="reduce-overhead"),
    COMPILED: programs.graph,
}
AFFORDABLE = 2**27
"""Numbers in an op's inputs up to which the float64 truth is computed; 8192 x 8192 is half of it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all rows of one run share."""

    probes: Probes
    machine: Machine
    device: torch.device
    rounds: int
    seed: int
    columns: frozenset[str] | None = None
    """The implementations wanted; all where None. The baseline is always timed."""
    functions: Mapping[str, Function] = field(default_factory=dict)
    """Anyone's, by package.module:function, called like the op's reference."""

    def wants(self, implementation: str) -> bool:
        return self.columns is None or implementation == EAGER or implementation in self.columns


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A column, ready to be timed."""

    column: Column
    copies: list[Arguments]
    call: Callable[..., Any]
    compiled: Compiled | None
    peak_bytes: int | None
    verdict: Verdict | None

    @property
    def copied_bytes(self) -> int:
        return sum(nbytes([arguments[name] for name in self.column.from_memory]) for arguments in self.copies)


@torch.no_grad()
def measure_op(setting: Setting, shape: Shape, storage: Storage, run: Run) -> list[Row]:
    """Every wanted implementation of an op: compiled if it is to be, judged, and timed in turn with the others."""
    prepared = setting.prepare(setting.case(shape, run.seed), storage)
    about = _About(setting, prepared, storage, run)
    truth = _remembered(setting.op.reference)
    entries: dict[str, _Entry] = {}
    untimed: list[Row] = []
    for name, column in _columns(prepared, run).items():
        if name == REDUCE_OVERHEAD and run.device.type == "cpu":
            untimed.append(
                about.row(name, note="no CUDA graphs on a CPU, so the program is that of torch.compile; not timed")
            )
            continue
        try:
            entries[name] = _entry(column, _COMPILES.get(name), setting, prepared, truth, run)
        except Exception as error:  # of anyone's function, or of torch.compile: the others go on
            if name == EAGER:
                raise
            untimed.append(about.row(name, error=reason(error)))
    calls = {name: in_turn(entry.call, entry.copies) for name, entry in entries.items()}
    # The probes leave the caches full of theirs: whatever comes next is called once more than is counted.
    every = {**run.probes.calls, "": calls[EAGER], **calls}
    timings = interleave({name: sample_of(call, run.device) for name, call in every.items()}, run.rounds)
    limits = run.probes.limits(timings)
    timed = [about.timed(name, entry, timings[name], timings[EAGER], limits) for name, entry in entries.items()]
    return timed + untimed


def _columns(prepared: Prepared, run: Run) -> dict[str, Column]:
    """By implementation, those that are wanted."""
    columns = dict.fromkeys((EAGER, TORCH_COMPILE, MAX_AUTOTUNE, REDUCE_OVERHEAD), prepared.reference)
    if prepared.compiled is not None:
        columns[COMPILED] = prepared.compiled
    for name, function in run.functions.items():
        given = prepared.given
        columns[name] = Column(program=function, arguments=given.arguments, from_memory=given.from_memory)
    return {name: column for name, column in columns.items() if run.wants(name)}


def _entry(
    column: Column, compile: Compile | None, setting: Setting, prepared: Prepared, truth: Function, run: Run
) -> _Entry:
    copies = [moved(arguments, run.device) for arguments in column.copies()]
    if column.example is not None:
        column = replace(column, example=moved(column.example, run.device))
    compiled = None if compile is None else compile_program(compile, column, copies)
    call = column.program if compiled is None else compiled.call
    result = column.as_reference(call(**copies[0]))
    return _Entry(
        column=column,
        copies=copies,
        call=call,
        compiled=compiled,
        peak_bytes=_peak_bytes(lambda: call(**copies[0]), run.device),
        verdict=_judged(result, setting, prepared, truth),
    )


def _judged(result: Any, setting: Setting, prepared: Prepared, truth: Function) -> Verdict | None:
    """What the op's guarantee says of a result on the very inputs that are timed; None where that costs too much."""
    if sum(leaf.numel() for value in prepared.inputs.values() for leaf in leaves(value)) > AFFORDABLE:
        return None
    op = setting.op
    return op.guarantee.judge(Trial(prepared.case, prepared.inputs, truth, lambda **_: result, op.outputs, once=True))


def _remembered(reference: Function) -> Function:
    """The reference, computed once for each dtype of the inputs: every column is held against the same."""
    results: dict[tuple[torch.dtype, ...], Any] = {}

    def call(**inputs: Any) -> Any:
        dtypes = tuple(leaf.dtype for value in inputs.values() for leaf in leaves(value))
        if dtypes not in results:
            results[dtypes] = reference(**inputs)
        return results[dtypes]

    return call


def _peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises during a call above what was taken before: results and scratch."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    return_freed_memory()
    if not forget_peak():
        return None
    resident = resident_bytes()
    call()
    peak = peak_resident_bytes()
    return None if peak is None or resident is None else max(0, peak - resident)


@dataclass(frozen=True)
class _About:
    """What the rows of one op, size and storage share."""

    setting: Setting
    prepared: Prepared
    storage: Storage
    run: Run

    def row(self, implementation: str, **figures: Any) -> Row:
        run, case = self.run, self.prepared.case
        return Row(
            kind=Kind.OP,
            name=self.setting.op.name,
            shape=case.sizes,
            storage=self.storage,
            implementation=implementation,
            rows=case.sizes["B"] * case.sizes.get("T", 1),
            baseline=EAGER,
            bytes=self.prepared.bytes,
            flops=self.setting.op.flops(case.n),
            seed=run.seed,
            machine=run.machine,
            repro=repro(self.setting.op.name, case.sizes, self.storage, implementation, run),
            **figures,
        )

    def timed(self, name: str, entry: _Entry, timing: Timing, baseline: Timing, limits: Limits) -> Row:
        """The row of what was timed, or of why it could not be."""
        judged, compiled = entry.verdict, entry.compiled
        figures: dict[str, Any] = {
            "note": entry.column.note,
            "limits": limits,
            "copies": len(entry.copies),
            "copied_bytes": entry.copied_bytes,
            "peak_memory_bytes": entry.peak_bytes,
            "accuracy": _accuracy(judged),
            "error_over_bound": judged.ratio if judged is not None and judged.ratio < float("inf") else None,
        }
        if compiled is not None:
            on_gpu = self.run.device.type == "cuda"
            figures |= {
                "compile_cold_s": compiled.cold_s,
                "compile_warm_s": compiled.warm_s,
                "graphs": compiled.graphs,
                "graph_breaks": compiled.graph_breaks,
                "recompiles": compiled.recompiles,
                "launches": compiled.launches if on_gpu else None,
                "parallel_loops": None if on_gpu else compiled.parallel_loops,
            }
        if timing.error is not None:
            return self.row(name, error=timing.error, **figures)
        return self.row(name, **figures, **self._speeds(timing, baseline, limits))

    def _speeds(self, timing: Timing, baseline: Timing, limits: Limits) -> dict[str, Any]:
        median = quantile(timing.seconds, 0.5)
        flops, ratios = self.setting.op.flops(self.prepared.case.n), paired_ratios(baseline, timing)
        return {
            "p20_s": quantile(timing.seconds, 0.2),
            "p50_s": median,
            "p80_s": quantile(timing.seconds, 0.8),
            "repeats": len(timing.seconds),
            "calls": timing.calls,
            "speed_up": quantile(ratios, 0.5),
            "speed_up_p20": quantile(ratios, 0.2),
            "speed_up_p80": quantile(ratios, 0.8),
            "gb_per_s": self.prepared.bytes / median / 1e9,
            "gflop_per_s": flops / median / 1e9,
            "share_of_limit": share_of_limit(self.prepared.bytes, flops, median, limits),
        }


def _accuracy(verdict: Verdict | None) -> Accuracy:
    if verdict is None or verdict.status is Status.REJECTED:
        return Accuracy.NOT_JUDGED
    return Accuracy.FAILED if verdict.failed else Accuracy.PASSED


def repro(op: str, shape: Shape, storage: Storage, implementation: str, run: Run) -> str:
    """The command that measures this implementation again, and the baseline beside it."""
    words = ["twinfer", "bench", "ops", "--op", op, "--shape", written(shape), "--storage", storage.value]
    if implementation in run.functions:
        words += ["--impl", implementation]
    words += ["--column", implementation, "--rounds", str(run.rounds), "--seed", str(run.seed)]
    if run.device.type != "cpu":
        words += ["--device", str(run.device)]
    return shlex.join(words)


def selected(
    settings: Sequence[Setting], shapes: Sequence[Shape], storages: Sequence[Storage], *, quick: bool
) -> list[tuple[Setting, Shape, Storage]]:
    """Every op, size and storage of a run; shapes and storages are the settings' own where none are given."""
    return [
        (setting, shape, storage)
        for setting in settings
        for shape in shapes or (setting.quick if quick else setting.shapes)
        for storage in setting.storages
        if not storages or storage in storages
    ]
