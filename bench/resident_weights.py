"""Weights that stay in memory against a larger batch: `python -m twinfer.bench.resident_weights FOLDER`.

One budget is spent in several ways: a share of it keeps weights, which are not read again, and the rest goes to as many
sequences as it holds. With weights of W bytes, a budget of M, a share s of it for weights, sequences of c bytes and a
disk of D bytes a second, a step of the batch B = (1 - s) M / c takes

    max((W - s M) / D, computing(B))

While reading is the longer of both, B tokens a step are D (1 - s) M / (c (W - s M)) a second, which falls with s as
long as M < W: no weights should stay (the paper's section VI-A). Once computing is the longer, a larger batch yields
little, and what it would take is worth more for weights, up to where both are equal. So the same budget is spent on
sequences of 256 tokens, of which so few fit that their computing hides behind the reads, and on short ones.

The model has equal layers of random weights, float32, and runs uncompiled.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..offload.building import build
from ..offload.measuring import Speeds, compute_step, measure
from ..offload.path import OffloadPath
from ..offload.plan import MOST_SLOTS
from ..offload.store import Store, open_store
from ..oracle.models import RandomSource
from ..spec.config import ModelConfig, Storage
from .beyond_memory import config as deep

LAYERS = 16
BUDGET = 224 << 20
SHARES = (0.0, 0.2, 0.4, 0.6)
"""Shares of the budget that go to weights that stay."""

RESERVES = (256, 48)
"""Tokens of a sequence: many, of which few sequences fit, and few."""

STEPS = 6


def config() -> ModelConfig:
    """Return layers of 4.2 million weights each."""
    model = deep()
    return replace(model, layers=model.layers[:LAYERS], vocabulary=8192, context=max(RESERVES))


def measured(store: Store, reserve: int, share: float, speeds: Speeds) -> dict[str, Any]:
    """Return what the budget yields with that share of it for weights: medians of decode steps at half the length."""
    kept = int(BUDGET * share)
    path = OffloadPath(store, config(), budget=BUDGET - kept, dram_budget=kept, mode="eager")
    batch = path.most_batch(reserve, away=False)
    sequences = path.open(batch, reserve)
    sequences.advance([reserve // 2] * batch, sequences.last_BV)
    steps = []
    for step in range(STEPS + 2):  # the first ones fill what stays
        begin_s = time.perf_counter()
        path.extend(sequences, [torch.tensor([step])] * batch)
        steps.append(time.perf_counter() - begin_s)
    sequences.close()
    computing_s = compute_step(path, batch, reserve).computing.total_s
    plan = path.plan
    assert plan is not None
    path.close()
    step_s = sorted(steps[2:])[STEPS // 2]
    return {
        "reserve": reserve,
        "share": share,
        "kept_bytes": plan.dram_bytes,
        "read_bytes": plan.step_bytes,
        "batch": batch,
        "reading_s": plan.fetch_s(speeds.disk, speeds.copies),
        "computing_s": computing_s,
        "step_s": step_s,
        "tokens_per_s": batch / step_s,
    }


def main(folder: Path) -> dict[str, Any]:
    """Build, and measure each share; returns the report."""
    if not folder.exists():
        source = RandomSource(config(), 5)
        build(source, folder, Storage.FLOAT32, model={}, files={}, identity=6, report=lambda line: None)
    store = open_store(folder)
    rows = [measured(store, reserve, share, measure(store, MOST_SLOTS)) for reserve in RESERVES for share in SHARES]
    return {"weights_bytes": store.nbytes, "budget_bytes": BUDGET, "rows": rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
