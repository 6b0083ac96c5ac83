"""A store run in a process that is limited to less memory than its weights, beside all weights in memory.

The limited process imports everything, and is then given so many bytes beyond what it takes already. Its tokens and
logits must be those of the compiled path. Both run uncompiled unless `compiled` is said: a compiler takes more memory
than the model is given, so programs are compiled before the limit holds. What each layer needs (`Store.resident`) is
read before as well, and counted as if it were after.

The limit is that of a memory control group (Linux, as root), page cache counted: a process that exceeds it is killed.
Where none can be made the process runs without, and the report says so.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiled.machine import return_freed_memory
from ..compiled.path import CompiledPath, Mode
from ..offload.building import build
from ..offload.direct import DirectFile
from ..offload.events import Kind, seconds
from ..offload.measuring import measure
from ..offload.path import OffloadPath
from ..offload.store import Store, open_store
from ..spec.config import Storage
from ..spec.decoder import Decoder
from ..spec.weights import WeightSource

PROMPT = tuple(range(100, 116))
NEW_TOKENS = 6

_GROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, how it is kept, and what it is given."""

    module: str
    """The bench's own name, which the limited process runs with `limited`."""
    source: WeightSource
    storage: Storage
    limit: Callable[[Store], int]
    """Bytes beyond the interpreter."""
    slack: int
    """Bytes of the limit that the budget leaves: torch's code that is first run then, threads, the allocator's gaps."""


def command(case: Case, arguments: list[str]) -> None:
    """Print the report of FOLDER in a mode, uncompiled by default, or as its limited process what it found."""
    folder, mode = Path(arguments[0]), Mode(arguments[1]) if arguments[1:] else Mode.EAGER
    if arguments[2:] == ["limited"]:
        torch.set_num_threads(1)
        print(json.dumps(limited(case, folder, mode)))
    else:
        print(json.dumps(compared(case, folder, mode), indent=1))


def compared(case: Case, folder: Path, mode: Mode = Mode.EAGER) -> dict[str, Any]:
    """Build the store if it is missing, run both, compare; returns the report."""
    begin_s, found = time.perf_counter(), folder.exists()
    if not found:
        build(case.source, folder, case.storage, model={}, files={}, identity=5, report=lambda line: None)
    built_s = None if found else time.perf_counter() - begin_s
    store = open_store(folder)
    assert DirectFile(store.weights).direct, "the folder's file system knows no direct reads"
    report = of_limited_process(case.module, folder, mode)
    speeds = measure(store, report["plan"]["slots"])
    ids, _, bits = generated(CompiledPath(case.source, storage=case.storage, mode=mode))
    median_s = sorted(report["step_s"][1:])[(NEW_TOKENS - 1) // 2]
    return report | {
        "mode": mode.value,
        "same_tokens": ids == report["ids"],
        "same_bits": bits == report.pop("bits"),
        "built_s": built_s,
        "disk_gb_s": speeds.disk / 1e9,
        "token_s": median_s,
        "share_of_disk": report["read_bytes_a_step"] / median_s / speeds.disk,
    }


def of_limited_process(module: str, folder: Path, mode: Mode) -> dict[str, Any]:
    """Return what the limited process reports; its group is removed when it has ended."""
    ran = subprocess.run(
        [sys.executable, "-m", module, str(folder), mode, "limited"], stdout=subprocess.PIPE, text=True, check=False
    )
    with contextlib.suppress(OSError):
        group_of(os.getpid()).rmdir()
    if ran.returncode != 0:
        raise SystemExit(f"the limited process ended with status {ran.returncode}")
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


def limited(case: Case, folder: Path, mode: Mode = Mode.EAGER) -> dict[str, Any]:
    """Generate under the limit, which counts what is taken after the process joins its group."""
    store = open_store(folder)
    torch.ones(64, 64) @ torch.ones(64, 64)
    limit, before = case.limit(store), store.resident.nbytes
    decoder = OffloadPath(store, case.source.config, budget=limit - case.slack, mode=mode)
    decoder.compile(batches=False)
    return_freed_memory()
    base, group = resident_bytes() - before, own_group()
    if group is not None:
        (group / "memory.limit_in_bytes").write_text(str(limit - before))
    ids, steps, bits = generated(decoder)
    plan, experts, events = decoder.plan, decoder.experts, decoder.events
    assert plan is not None
    used = group / "memory.max_usage_in_bytes" if group is not None else None
    peak = before + int(used.read_text()) if used is not None else resident_bytes("VmHWM") - base
    decoder.close()
    swept = sum(record.nbytes for record in store.schedule)
    return {
        "ids": ids,
        "bits": bits,
        "step_s": steps,
        "weights_bytes": store.nbytes,
        "interpreter_bytes": base,
        "limit_beyond_bytes": limit,
        "ratio": store.nbytes / limit,
        "limited_by": "memory control group, page cache counted" if group is not None else "nothing: none can be made",
        "peak_beyond_bytes": peak,
        "plan": plan.as_json(),
        "read_bytes_a_step": swept + (0 if experts is None else experts.read_bytes // (NEW_TOKENS - 1)),
        "experts": None if experts is None else experts.as_json(),
        "waited_s": seconds(events, Kind.WAIT),
        "used_s": seconds(events, Kind.USE),
    }


def generated(decoder: Decoder) -> tuple[list[int], list[float], list[list[int]]]:
    """Return the likeliest tokens, the seconds of each step, and the bits of all logits."""
    sequences = decoder.open(1, len(PROMPT) + NEW_TOKENS)
    given, ids, steps, bits = torch.tensor(PROMPT), [], [], []
    for _ in range(NEW_TOKENS):
        begin_s = time.perf_counter()
        logits_V = decoder.extend(sequences, [given])[0]
        steps.append(time.perf_counter() - begin_s)
        bits.append(logits_V.view(torch.int32).tolist())
        ids.append(int(logits_V.argmax()))
        given = torch.tensor(ids[-1:])
    return ids, steps, bits


def own_group() -> Path | None:
    """Return a new control group that holds this process, or None where none can be made. Its parent removes it."""
    group = group_of(os.getppid())
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()))
        return group if (group / "memory.limit_in_bytes").exists() else None
    except OSError:
        return None


def group_of(process: int) -> Path:
    """Return the place of the group that a process makes for the one it limits."""
    return _GROUPS / f"twinfer-{process}"


def resident_bytes(field: str = "VmRSS") -> int:
    """Return what the system says that this process takes now, or another field of its status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
