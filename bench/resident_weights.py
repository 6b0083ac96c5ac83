"""Weights that stay in memory against a larger batch: `python -m twinfer.bench.resident_weights FOLDER`.

One budget is spent in several ways: a share of it keeps weights, which are not read again, and the rest goes to as many
sequences as it holds. Keeping a byte of weights saves reading that byte once a step; a further sequence shares every
byte that is read, so no weights should stay as long as reading takes longer than computing (the paper's section VI-A).

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
from ..offload.path import OffloadPath
from ..offload.store import Store, open_store
from ..oracle.models import RandomSource
from ..spec.config import ModelConfig, Storage
from .beyond_memory import config as deep

LAYERS = 16
BUDGET = 224 << 20
SHARES = (0.0, 0.2, 0.4, 0.6)
"""Shares of the budget that go to weights that stay."""

STEPS = 6


def config() -> ModelConfig:
    """Return layers of 4.2 million weights each."""
    model = deep()
    return replace(model, layers=model.layers[:LAYERS], vocabulary=8192)


def measured(store: Store, share: float) -> dict[str, Any]:
    """Return what the budget yields with that share of it for weights: medians of decode steps."""
    kept, model = int(BUDGET * share), config()
    path = OffloadPath(store, model, budget=BUDGET - kept, dram_budget=kept, mode="eager")
    batch = path.most_batch(model.context, away=False)
    sequences = path.open(batch, model.context)
    steps = []
    for step in range(STEPS + 2):  # the first ones fill what stays
        begin_s = time.perf_counter()
        path.extend(sequences, [torch.tensor([step])] * batch)
        steps.append(time.perf_counter() - begin_s)
    plan = path.plan
    assert plan is not None
    path.close()
    step_s = sorted(steps[2:])[STEPS // 2]
    return {
        "kept_bytes": plan.dram_bytes,
        "read_bytes": plan.step_bytes,
        "batch": batch,
        "step_s": step_s,
        "tokens_per_s": batch / step_s,
    }


def main(folder: Path) -> dict[str, Any]:
    """Build, and measure each share; returns the report."""
    if not folder.exists():
        source = RandomSource(config(), 5)
        build(source, folder, Storage.FLOAT32, model={}, files={}, identity=6, report=lambda line: None)
    store = open_store(folder)
    return {
        "weights_bytes": store.nbytes,
        "budget_bytes": BUDGET,
        "shares": {str(share): measured(store, share) for share in SHARES},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
