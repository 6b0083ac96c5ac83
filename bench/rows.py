"""One measured thing, as a line of JSON: what was run, how fast it was, how near to the machine's limit, how right.

A figure that was not measured is null; nothing is filled in. A file of rows is written whole or not at all.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..spec.errors import RequestError

SCHEMA = "twinfer.bench/2"
"""Changes with the meaning of any field; rows of two schemas are never compared."""


class Kind(StrEnum):
    OP = "op"
    MODEL = "model"


class Accuracy(StrEnum):
    """What the oracle says of the very program and inputs that were timed."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a row was measured, and by which versions."""

    processor: str
    """The CPU's name, whatever the device."""
    instructions: str
    """The widest vectors that torch uses on it: "AVX2", "AVX512", "DEFAULT"."""
    threads: int
    gpu: str | None
    """The GPU's name where the row ran on one."""
    python: str
    torch: str
    twinfer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that was seen on this machine while the row was timed, or in its run, and which way gave it."""

    read_bytes_per_s: float
    read_by: str
    gemm_flops_per_s: float
    """float32."""
    gemm_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation of one thing at one size."""

    kind: Kind
    name: str
    """Of the op, or of the model."""
    shape: Mapping[str, int]
    """Size of each axis, by its letter; of a model, what was run: {"prompt": 512}."""
    storage: str
    implementation: str
    rows: int | None = None
    """Rows that one call computes: tokens of all sequences, the batch of a decode step."""
    error: str | None = None
    """Why there are no times: it recompiled while it was timed, it raised."""
    note: str | None = None
    p20_s: float | None = None
    """Seconds a call, quantiles over the repeats."""
    p50_s: float | None = None
    p80_s: float | None = None
    repeats: int | None = None
    calls: int | None = None
    """Calls in each repeat."""
    tokens_per_s: float | None = None
    baseline: str | None = None
    """The implementation that speed-ups are over; it was timed in turn with this one."""
    speed_up: float | None = None
    """Median over the repeats of (baseline's seconds / own seconds), both of the same repeat."""
    speed_up_p20: float | None = None
    speed_up_p80: float | None = None
    bytes: int | None = None
    """Least that a call must read and write, by the op's formula, weights as stored."""
    flops: int | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    share_of_limit: float | None = None
    """Seconds that the nearer limit allows / seconds taken: max(bytes / bandwidth, flops / GEMM rate) / p50_s."""
    copies: int | None = None
    """Copies of weights and caches in turn, one a call, so that what must come from memory does."""
    copied_bytes: int | None = None
    """Of all these copies."""
    compile_cold_s: float | None = None
    """Seconds of the first call with every cache empty, the compiler itself started before."""
    compile_warm_s: float | None = None
    """Seconds of the first call of the same program compiled once more, caches filled."""
    graphs: int | None = None
    graph_breaks: Sequence[str] | None = None
    """file:line: reason, of each."""
    recompiles: int | None = None
    """Programs compiled after the first call, before timing; within timing one is an error."""
    parallel_loops: int | None = None
    """`#pragma omp for` in the generated C++; on a CPU."""
    launches: int | None = None
    """Kernels launched in a call; on a GPU."""
    peak_memory_bytes: int | None = None
    """Of a model: the most that its process had resident. Of an op: how far a call rose above what was resident."""
    accuracy: Accuracy = Accuracy.NOT_JUDGED
    error_over_bound: float | None = None
    """Largest error / bound; above 1 fails. Null where it is not finite, or was not judged."""
    seed: int | None = None
    limits: Limits | None = None
    machine: Machine
    repro: str
    """The command that measures this row, and the baseline that it needs, again."""

    schema: str = field(default=SCHEMA, init=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"row {self.name} {self.implementation}: {each.name} is {value}; it must be finite")

    @property
    def identity(self) -> tuple[object, ...]:
        """What the row measures; rows of two runs with equal identities may be compared."""
        shape = tuple(sorted(self.shape.items()))
        return self.kind, self.name, shape, self.storage, self.implementation, self.baseline

    @property
    def title(self) -> str:
        """
        >>> Row(kind=Kind.OP, name="linear", shape={"T": 1, "N": 8}, storage="int8", implementation="eager",
        ...     machine=Machine(processor="", instructions="", threads=1, gpu=None, python="", torch="", twinfer=""),
        ...     repro="").title
        'linear T=1,N=8 int8 eager'
        """
        return f"{self.name} {written(self.shape)} {self.storage} {self.implementation}"

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


def written(shape: Mapping[str, int]) -> str:
    """As the command line takes it: "T=1,N=4096"."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items())


def highest_limits(rows: Iterable[Row]) -> Limits | None:
    """The most of each that any row's limits say; None where no row has any."""
    limits = [row.limits for row in rows if row.limits is not None]
    if not limits:
        return None
    reading = max(limits, key=lambda each: each.read_bytes_per_s)
    multiplying = max(limits, key=lambda each: each.gemm_flops_per_s)
    return replace(reading, gemm_flops_per_s=multiplying.gemm_flops_per_s, gemm_by=multiplying.gemm_by)


def from_json(line: str) -> Row:
    """The row that `to_json` wrote. Raises `RequestError` that says what is wrong with the line."""
    try:
        parts: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"not a row of JSON: {error}") from error
    schema = parts.pop("schema", None) if isinstance(parts, dict) else None
    if schema != SCHEMA:
        raise RequestError(f"the row's schema is {schema!r}; this version reads {SCHEMA!r}")
    try:
        parts["kind"], parts["accuracy"] = Kind(parts["kind"]), Accuracy(parts["accuracy"])
        parts["machine"] = Machine(**parts["machine"])
        parts["limits"] = None if parts["limits"] is None else Limits(**parts["limits"])
        if parts["graph_breaks"] is not None:
            parts["graph_breaks"] = tuple(parts["graph_breaks"])
        return Row(**parts)
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"not a row of {SCHEMA}: {error}") from error


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of one row a line; a crash leaves the file that was there before, or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("x", encoding="utf-8") as file:
            file.writelines(row.to_json() + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the renaming itself survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: Path) -> list[Row]:
    """Every row of a file. Raises `RequestError` that names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(from_json(line))
        except RequestError as error:
            raise RequestError(f"{path}, line {number}: {error}") from error
    return rows
