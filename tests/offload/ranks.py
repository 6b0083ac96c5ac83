"""Pairs of ranks over a store, and resident ones beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.offload.rank_plan import plan_of_rank
from twinfer.offload.shares import build_shares
from twinfer.offload.store import Store
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import (
    ModelConfig,
    Storage,
)
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import ParallelConfig

from ..parallel.drawn import draw_calls
from ..parallel.pool import Pool
from .small import BUDGET

TENSOR, STAGES, DATA = ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig(data=2)
SEED = 600

MIXTURES = {
    "tensor": TENSOR,
    "expert": ParallelConfig(tensor=2, expert=2),
    "expert of data groups": ParallelConfig(data=2, expert=2),
    "slices": ParallelConfig(tensor=2, expert_slices=2),
}


def shares_of(
    model: ModelConfig,
    seed: int,
    storage: Storage,
    parallel: ParallelConfig,
    folder: Path,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    given: dict[str, Any] = {"model": {"name": "m"}, "files": {}, "identity": seed, "report": report}
    build_shares(RandomSource(model, seed), folder, storage, parallel, **given)
    return folder


def assert_as_resident(
    pool: Pool,
    model: ModelConfig,
    parallel: ParallelConfig,
    storage: Storage,
    folder: Path,
    *,
    batch: int = 3,
    every_position: bool = False,
    equal: Callable[[Tensor, Tensor], bool] = same_bits,
    **how: Any,
) -> list[dict[str, Any]]:
    """Logits of all calls have the bits of the ranks that hold their weights; what is sent has the same bytes.

    `how` is what `streamed.stream` takes besides.
    """
    calls = draw_calls(SEED, model.vocabulary, batch=batch)
    case = {"config": model, "parallel": parallel, "calls": calls, "every_position": every_position}
    resident = pool.run("extend", seed=SEED, storage=storage, **case)
    streamed = pool.run("extend_streamed", folder=str(folder), budget=BUDGET, **how, **case)
    for rank, ((wanted, counted), found) in enumerate(zip(resident, streamed, strict=True)):
        assert "error" not in found, found["error"]
        for got, want in zip(found["logits"], wanted, strict=True):
            pairs = zip(got, want, strict=True) if every_position else [(got, want)]
            assert all(equal(*pair) for pair in pairs), f"rank {rank} has other logits"
        assert sorted(found["counted"]) == sorted(counted), f"rank {rank}"
    return streamed


def least_of_rank(store: Store, local: ModelConfig) -> int:
    """Return the smallest budget of rank 1 for three sequences of 40 tokens, by the refusal."""
    given: dict[str, Any] = {"batch": 3, "reserve": 40, "compute": torch.float32, "expands": True}
    with pytest.raises(RequestError, match="the smallest that works is") as refused:
        plan_of_rank(store, local, TENSOR, 1, budget=1000, **given)
    return int(str(refused.value).rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))
