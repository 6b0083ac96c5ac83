"""A model many times larger than memory, under a hard limit: `python -m twinfer.bench.beyond_memory FOLDER`.

A model of equal layers with random weights is written as a store into FOLDER. A process of its own imports everything,
is then limited to a 25th of the weights beyond what it takes already, and generates. Its tokens and logits must be
those of the compiled path with all weights in memory. Both run uncompiled: a compiler takes more memory than the model
is given.

The limit is that of a memory control group (Linux, as root), page cache counted: a process that exceeds it is killed.
Where none can be made the process runs without, and the report says so.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..compiled.path import CompiledPath
from ..offload.building import build
from ..offload.direct import DirectFile
from ..offload.events import Kind, seconds
from ..offload.measuring import measure
from ..offload.path import OffloadPath
from ..offload.store import open_store
from ..oracle.models import RandomSource
from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    Storage,
)
from ..spec.decoder import Decoder

RATIO = 25
"""The weights' bytes over the limit beyond the interpreter."""

LAYERS = 120
PROMPT = tuple(range(100, 116))
NEW_TOKENS = 6
SLACK = 24 << 20
"""Bytes of the limit that the budget leaves: torch's code that is first run then, threads, what the allocator holds."""

_GROUPS = Path("/sys/fs/cgroup/memory")


def config() -> ModelConfig:
    """Return 120 equal layers of 4.2 million weights each."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=8, kv_heads=8, head_size=64, scale=0.125),
        mlp=MlpConfig(width=2048, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family="random",
        hidden=512,
        vocabulary=32768,
        context=64,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        learned_positions=True,
        head=Head.UNTIED,
    )


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


def limited(folder: Path) -> dict[str, Any]:
    """Generate under the limit, which counts what is taken after the process joins its group."""
    store = open_store(folder)
    torch.ones(64, 64) @ torch.ones(64, 64)
    extra = store.nbytes // RATIO
    base = resident_bytes()
    group = own_group()
    if group is not None:
        (group / "memory.limit_in_bytes").write_text(str(extra))
    decoder = OffloadPath(store, config(), budget=extra - SLACK, mode="eager")
    ids, steps, bits = generated(decoder)
    plan = decoder.plan
    assert plan is not None
    events = decoder.events
    used = group / "memory.max_usage_in_bytes" if group is not None else None
    peak = int(used.read_text()) if used is not None else resident_bytes("VmHWM") - base
    decoder.close()
    return {
        "ids": ids,
        "bits": bits,
        "step_s": steps,
        "weights_bytes": store.nbytes,
        "interpreter_bytes": base,
        "limit_beyond_bytes": extra,
        "limited_by": "memory control group, page cache counted" if group is not None else "nothing: none can be made",
        "peak_beyond_bytes": peak,
        "slots": plan.slots,
        "planned_bytes": plan.total_bytes,
        "step_bytes": plan.step_bytes,
        "waited_s": seconds(events, Kind.WAIT),
        "used_s": seconds(events, Kind.USE),
    }


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
    return _GROUPS / f"twinfer-{process}"


def resident_bytes(field: str = "VmRSS") -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def main(folder: Path) -> dict[str, Any]:
    """Build, run both, compare; returns the report."""
    source = RandomSource(config(), 5)
    begin_s = time.perf_counter()
    if not folder.exists():
        build(source, folder, Storage.FLOAT32, model={}, files={}, identity=5, report=lambda line: None)
    built_s = time.perf_counter() - begin_s
    store = open_store(folder)
    assert DirectFile(store.weights).direct, "the folder's file system knows no direct reads"
    ran = subprocess.run(
        [sys.executable, "-m", "twinfer.bench.beyond_memory", str(folder), "limited"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    with contextlib.suppress(OSError):
        group_of(os.getpid()).rmdir()
    if ran.returncode != 0:
        raise SystemExit(f"the limited process ended with status {ran.returncode}")
    report: dict[str, Any] = json.loads(ran.stdout)
    speeds = measure(store)
    ids, _, bits = generated(CompiledPath(source, mode="eager"))
    median_s = sorted(report["step_s"][1:])[(NEW_TOKENS - 1) // 2]
    report |= {
        "same_tokens": ids == report["ids"],
        "same_bits": bits == report.pop("bits"),
        "built_s": built_s,
        "disk_gb_s": speeds.disk / 1e9,
        "token_s": median_s,
        "share_of_disk": report["step_bytes"] / median_s / speeds.disk,
    }
    return report


if __name__ == "__main__":
    if sys.argv[2:] == ["limited"]:
        torch.set_num_threads(1)
        print(json.dumps(limited(Path(sys.argv[1]))))
    else:
        print(json.dumps(main(Path(sys.argv[1])), indent=1))
