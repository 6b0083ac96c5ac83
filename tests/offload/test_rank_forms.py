"""Ranks over a store whose layers are cut, or that keep, move or measure in other ways: to the bit as resident ones."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from twinfer.offload import cutting
from twinfer.offload.expert_report import RankReport
from twinfer.offload.shares import open_shares
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.parallel.weights import local_config
from twinfer.spec.config import (
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    QkNormSpan,
    Residual,
    Storage,
)
from twinfer.spec.parallel import ParallelConfig

from ..parallel.drawn import draw_mixture, draw_model
from ..parallel.pool import Pool
from .ranks import DATA, MIXTURES, SEED, STAGES, TENSOR, assert_as_resident, least_of_rank, shares_of
from .small import built, config, wide_config


def _parallel(model: ModelConfig) -> ModelConfig:
    """Return the model with parallel sub-layers."""
    given = {"residual": Residual.PARALLEL, "norm_placement": NormPlacement.PRE_NORM}
    layers = tuple(replace(layer, **given) for layer in model.layers)
    return replace(model, layers=layers)


CUT = {
    "norms at outputs": (wide_config, TENSOR, Storage.FLOAT32),
    "int8": (wide_config, TENSOR, Storage.INT8),
    "parallel sub-layers": (lambda: _parallel(wide_config()), TENSOR, Storage.FLOAT32),
    "drawn": (lambda: draw_model(SEED + 1, layers=2), TENSOR, Storage.INT8),
    "stages": (wide_config, STAGES, Storage.FLOAT32),
    "data groups": (wide_config, DATA, Storage.FLOAT32),
}


def cut_shares(
    name: str, folder: Path, patch: pytest.MonkeyPatch, parts: bool = True
) -> tuple[ModelConfig, ParallelConfig, Storage]:
    """Make a store for ranks whose dense layers are several records, unless `parts` is False."""
    draw, parallel, storage = CUT[name]
    model = replace(draw(), vocabulary=200)
    patch.setattr(cutting, "LEAST", 1 if parts else 1 << 40)
    if parallel is TENSOR:
        shares_of(model, SEED, storage, parallel, folder)
    else:
        built(RandomSource(model, SEED), folder, storage)
    return model, parallel, storage


@pytest.mark.parametrize("name", CUT)
def test_ranks_stream_layers_in_several_records(
    two: Pool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, and what is sent, are those of ranks that hold their weights, for layers that are cut."""
    model, parallel, storage = cut_shares(name, tmp_path / "s", monkeypatch)
    ranks = assert_as_resident(two, model, parallel, storage, tmp_path / "s")
    assert all(any(", up" in what for what, _, _ in each["reads"]) for each in ranks)


def test_ranks_need_less_memory_for_layers_that_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's smallest budget falls by at least a buffer's difference."""
    least, largest = [], []
    for parts in (True, False):
        folder = tmp_path / str(parts)
        model, parallel, _ = cut_shares("norms at outputs", folder, monkeypatch, parts)
        store = open_shares(folder).of_rank(parallel, 1)
        largest.append(max(record.nbytes for record in store.schedule))
        least.append(least_of_rank(store, local_config(model, parallel, 0)))
    assert largest[0] < largest[1] / 2
    assert least[1] - least[0] >= largest[1] - largest[0]


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        ("blocks of the down reversed", "norms at outputs"),
        ("inner numbers of another block", "norms at outputs"),
        ("attention left out", "parallel sub-layers"),
        ("attention added on after the sum", "parallel sub-layers"),
        ("the MLP's part not added up", "norms at outputs"),
        ("norm of a record that is gone", "data groups"),
    ],
)
def test_seeded_faults_of_cut_layers_are_caught(
    two: Pool, mutant: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each changes logits."""
    model, parallel, storage = cut_shares(name, tmp_path / "s", monkeypatch)
    with pytest.raises(AssertionError, match="has other logits"):
        assert_as_resident(two, model, parallel, storage, tmp_path / "s", mutant=mutant)


@pytest.mark.parametrize("parallel", [TENSOR, DATA], ids=["tensor", "data"])
def test_what_dram_keeps_is_read_once(two: Pool, parallel: ParallelConfig, tmp_path: Path) -> None:
    """By each rank, of its records or its parts of them; logits are the same."""
    model, folder = small_store(parallel, tmp_path / "s")
    for each in assert_as_resident(two, model, parallel, Storage.FLOAT32, folder, dram=60_000):
        times = Counter(name for name, _, _ in each["reads"] if name.startswith(("layer", "head")))
        kept, plan = [name for name in times if times[name] == 1], each["plan"]
        assert len(kept) == len(plan.dram_records) > 0
        assert all(times[name] >= 4 for name in times if name not in kept)
        assert 0 < plan.dram_bytes <= 60_000


def near(got: Tensor, want: Tensor) -> bool:
    """Return whether logits differ in their last bits at most, as torch takes float32 to be close."""
    return torch.allclose(got, want, rtol=1.3e-6, atol=1e-5)


BLOCKS = {
    "tensor": (config, TENSOR),
    "data": (config, DATA),
    "cut": (wide_config, TENSOR),
    "heads normed together": (lambda: _all_heads(config()), TENSOR),
}


def _all_heads(model: ModelConfig) -> ModelConfig:
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = model.layers[0]
    attention = replace(layer.attention, qk_norm=norm, qk_norm_span=QkNormSpan.ALL_HEADS, kv_heads=2)
    return replace(model, layers=(replace(layer, attention=attention),) * 3)


def blocks(pool: Pool, name: str, folder: Path, patch: pytest.MonkeyPatch, **how: Any) -> None:
    """Compare ranks that attend to keys and values of whole pages at a time with resident ones."""
    draw, parallel = BLOCKS[name]
    model = replace(draw(), vocabulary=200)
    patch.setattr(cutting, "LEAST", 1 if name == "cut" else 1 << 40)
    if parallel is TENSOR:
        shares_of(model, SEED, Storage.FLOAT32, TENSOR, folder)
    else:
        built(RandomSource(model, SEED), folder)
    given = {"away": len(model.layers), "block_tokens": 128, "batch": 4, **how}
    assert_as_resident(pool, model, parallel, Storage.FLOAT32, folder, equal=near, **given)


@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_attend_block_by_block(two: Pool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no layer's keys and values fit; logits differ in their last bits only."""
    blocks(two, name, tmp_path / "s", monkeypatch)


def test_a_fault_of_blocks_is_caught(two: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that attends to another one's keys and values has other logits."""
    with pytest.raises(AssertionError, match="has other logits"):
        blocks(two, "tensor", tmp_path / "s", monkeypatch, mutant="sequences' keys and values exchanged")


@pytest.mark.parametrize("seed", range(60 if settings.default.max_examples > 1000 else 3))
def test_ways_of_streaming_together(two: Pool, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a drawn config, degree and storage: layers cut or not, some keys and values and some records elsewhere."""
    pick = RandomPicker(seed)
    parallel, storage = pick.choice([TENSOR, STAGES, DATA]), pick.choice([Storage.FLOAT32, Storage.INT8])
    model = draw_model(SEED + seed, layers=pick.integer(2, 4))
    monkeypatch.setattr(cutting, "LEAST", pick.choice([1, 1 << 40]))
    if parallel is TENSOR:
        shares_of(model, SEED, storage, TENSOR, tmp_path / "s")
    else:
        built(RandomSource(model, SEED), tmp_path / "s", storage)
    how = {"away": pick.integer(0, 1), "dram": pick.choice([0, 1 << 14, 1 << 20]), "batch": pick.integer(2, 4)}
    assert_as_resident(two, model, parallel, storage, tmp_path / "s", **how)


def small_store(parallel: ParallelConfig, folder: Path) -> tuple[ModelConfig, Path]:
    """Return the small model, and a store of it for a job."""
    model = config()
    if parallel is TENSOR:
        return model, shares_of(model, SEED, Storage.FLOAT32, TENSOR, folder)
    return model, built(RandomSource(model, SEED), folder).folder


def test_a_fault_of_dram_is_caught(two: Pool, tmp_path: Path) -> None:
    """A record that is copied from another one's memory changes logits, where no checksum is looked at."""
    model, folder = small_store(TENSOR, tmp_path / "s")
    given = {"dram": 1 << 20, "mutant": "copied from another record's memory"}
    with pytest.raises(AssertionError, match="has other logits"):
        assert_as_resident(two, model, TENSOR, Storage.FLOAT32, folder, **given)


@pytest.mark.parametrize("parallel", [TENSOR, STAGES, DATA], ids=["tensor", "stages", "data"])
def test_measuring_changes_nothing(two: Pool, parallel: ParallelConfig, tmp_path: Path) -> None:
    """All ranks know the same seconds of all of them, and what follows has the bits of resident ranks."""
    model, folder = small_store(parallel, tmp_path / "s")
    first, second = assert_as_resident(two, model, parallel, Storage.FLOAT32, folder, measures=True)
    assert first["measured"] == second["measured"]
    for of_ranks in first["measured"]:
        assert all(layers > 0 and rest > 0 for layers, _, rest, _ in of_ranks)
        assert of_ranks[1][1] > 0, "the head's rank computes it"


def test_ranks_report_what_they_read_of_experts(two: Pool, tmp_path: Path) -> None:
    """To each other, byte for byte what each of them read."""
    parallel, model = MIXTURES["expert"], draw_mixture(400)
    folder = shares_of(model, SEED, Storage.INT8, parallel, tmp_path / "s")
    ranks = assert_as_resident(two, model, parallel, Storage.INT8, folder, batch=1)
    assert ranks[0]["experts"] == ranks[1]["experts"]
    reports = [RankReport(counts=counts) for counts in ranks[0]["experts"]]
    for each, report in zip(ranks, reports, strict=True):
        shown = report.as_json()
        read = sum(nbytes for name, _, nbytes in each["reads"] if "expert" in name)
        assert shown["read_bytes"] + shown["prompt_bytes"] == read > 0
    together = RankReport.summed(reports).as_json()
    assert together["needed"] == sum(report.as_json()["needed"] for report in reports)
