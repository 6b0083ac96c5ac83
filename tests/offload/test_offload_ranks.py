"""Ranks that stream their shares of a model give what ranks that hold them give, to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from twinfer.offload.shares import build_shares
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.parallel import ParallelConfig

from ..parallel.drawn import draw_calls, draw_model
from ..parallel.pool import Pool, started
from .small import BUDGET

SEEDS = range(600, 602)
TENSOR = ParallelConfig(tensor=2)


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with started(2) as pool:
        yield pool


def shares_of(config: ModelConfig, seed: int, storage: Storage, parallel: ParallelConfig, folder: Path) -> Path:
    given: dict[str, Any] = {"model": {"name": "m"}, "files": {}, "identity": 1, "report": lambda line: None}
    build_shares(RandomSource(config, seed), folder, storage, parallel, **given)
    return folder


def assert_as_resident(
    pool: Pool, config: ModelConfig, seed: int, parallel: ParallelConfig, storage: Storage, folder: Path, **given: Any
) -> list[Any]:
    """Logits of all calls have the bits of the ranks that hold their weights; what is sent has the same bytes."""
    calls = draw_calls(seed, config.vocabulary, batch=3)
    case = {"config": config, "parallel": parallel, "calls": calls}
    resident = pool.run("extend", seed=seed, storage=storage, **case)
    streamed = pool.run("extend_streamed", folder=str(folder), budget=BUDGET, **case, **given)
    for rank, ((wanted, counted), found) in enumerate(zip(resident, streamed, strict=True)):
        for got, want in zip(found["logits"], wanted, strict=True):
            assert same_bits(got, want), f"rank {rank}"
        assert sorted(found["counted"]) == sorted(counted), f"rank {rank}"
    return streamed


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_slices(two: Pool, seed: int, storage: Storage, tmp_path: Path) -> None:
    """For drawn configs in every storage, two ranks that share each layer."""
    config = draw_model(seed, layers=2, wide=storage is Storage.INT4)
    folder = shares_of(config, seed, storage, TENSOR, tmp_path / "s")
    assert_as_resident(two, config, seed, TENSOR, storage, folder)
