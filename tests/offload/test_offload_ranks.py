"""Ranks that stream their shares of a model give what ranks that hold them give, to the bit; and what breaks it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.offload.events import Kind
from twinfer.offload.form import PAGE
from twinfer.offload.rank_plan import plan_of_rank
from twinfer.offload.rank_source import RankSource
from twinfer.offload.shares import check_degrees, open_shares, whole_as_shares
from twinfer.offload.store import open_store
from twinfer.oracle.models import RandomSource
from twinfer.parallel.weights import local_config
from twinfer.reference.offload.kv_offload import link_use
from twinfer.reference.offload.partitioned import partition
from twinfer.spec.config import (
    ModelConfig,
    Storage,
)
from twinfer.spec.errors import CheckpointError, RequestError
from twinfer.spec.parallel import ParallelConfig

from ..parallel.drawn import draw_mixture, draw_model
from ..parallel.pool import Pool
from .ranks import DATA, MIXTURES, SEED, STAGES, TENSOR, assert_as_resident, least_of_rank, shares_of
from .small import built, config


@pytest.mark.parametrize("storage", Storage)
def test_ranks_that_share_layers(two: Pool, storage: Storage, tmp_path: Path) -> None:
    """For a drawn config in every storage; the records hold what each rank prepares, byte for byte."""
    model = draw_model(SEED, layers=2, wide=storage is Storage.INT4)
    folder = shares_of(model, SEED, storage, TENSOR, tmp_path / "s")
    assert_as_resident(two, model, TENSOR, storage, folder, every_position=storage is Storage.INT8)
    given = {"config": model, "seed": SEED, "parallel": TENSOR, "storage": storage}
    assert two.run("differing_layers", folder=str(folder), **given) == [[], []]


def test_stages_read_their_layers_of_any_store(two: Pool, tmp_path: Path) -> None:
    """One of the whole model serves them; neither reads a layer of the other, and only the last reads the head."""
    model = draw_model(SEED, layers=3)
    layers = len(model.layers)
    store = built(RandomSource(model, SEED), tmp_path / "s", Storage.INT8)
    first, last = assert_as_resident(two, model, STAGES, Storage.INT8, store.folder)
    seen = [{name for name, _, _ in each["reads"] if name.startswith("layer")} for each in (first, last)]
    half = -(-layers // 2)
    assert seen == [{f"layer {index}" for index in range(half)}, {f"layer {index}" for index in range(half, layers)}]
    assert {name for name, _, _ in last["reads"]} >= {record.name for record in store.head}


@pytest.mark.parametrize("storage", [Storage.FLOAT32, Storage.INT8])
def test_ranks_that_hold_the_same_read_a_part_each(two: Pool, storage: Storage, tmp_path: Path) -> None:
    """Of every record each reads what the one-process program partitions, and nothing twice in a sweep."""
    model = config()
    store = built(RandomSource(model, SEED), tmp_path / "s", storage)
    ranks = assert_as_resident(two, model, DATA, storage, store.folder)
    for rank, each in enumerate(ranks):
        for record in store.schedule:
            page_P = torch.arange(1, record.nbytes // PAGE + 1)
            part_P = partition(page_P, 2, rank)
            expected = [int(page) for page in part_P[part_P > 0] - 1] or [len(page_P) - 1]
            reads = {(offset, count) for name, offset, count in each["reads"] if name == record.name}
            assert reads == {(record.offset + expected[0] * PAGE, len(expected) * PAGE)}, f"rank {rank}, {record.name}"


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_read_chosen_experts(two: Pool, name: str, tmp_path: Path) -> None:
    """However experts are shared; what a rank's share has of them are records of their own."""
    parallel, model = MIXTURES[name], draw_mixture(400)
    folder = shares_of(model, SEED, Storage.INT8, parallel, tmp_path / "s")
    ranks = assert_as_resident(two, model, parallel, Storage.INT8, folder, batch=parallel.data)
    assert all(any("expert" in what for what, _, _ in each["reads"]) for each in ranks)


def moved(ranks: list[dict[str, Any]], layers: int) -> list[list[int]]:
    """Return, for each layer, the ranks that moved its keys and values."""
    of_rank = [{each.record for each in rank["events"] if each.kind is Kind.KV_READ} for rank in ranks]
    return [[rank for rank, seen in enumerate(of_rank) if layer in seen] for layer in range(layers)]


def assert_taking_turns(pool: Pool, model: ModelConfig, folder: Path, mutant: str | None = None) -> None:
    ranks = assert_as_resident(pool, model, TENSOR, Storage.FLOAT32, folder, away=3, mutant=mutant)
    assert moved(ranks, 6) == link_use(2, 6), "both at once"


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    """A model, and its store for two ranks."""
    model = replace(config(layers=6), vocabulary=200)
    return model, shares_of(model, SEED, Storage.FLOAT32, TENSOR, tmp_path_factory.mktemp("paired") / "s")


def test_neighbors_move_alternate_layers(two: Pool, paired: tuple[ModelConfig, Path]) -> None:
    """While one uses the link for a layer's keys and values the other does not, as in the one-process program."""
    model, folder = paired
    assert_taking_turns(two, model, folder)


@pytest.mark.parametrize(
    "mutant",
    [
        "records of another rank",
        "keys and values not written",
        "both move the same layers",
    ],
)
def test_seeded_faults_of_slices_are_caught(two: Pool, paired: tuple[ModelConfig, Path], mutant: str) -> None:
    """Each changes logits, or uses the link for both ranks at once."""
    with pytest.raises(AssertionError, match=r"has other logits|both at once"):
        assert_taking_turns(two, *paired, mutant)


@pytest.mark.parametrize(
    ("mutant", "parallel"),
    [("gathered backwards", DATA), ("gathered backwards, unverified", DATA), ("the first stage's layers", STAGES)],
)
def test_seeded_faults_of_whole_layers_are_caught(
    two: Pool, mutant: str, parallel: ParallelConfig, tmp_path: Path
) -> None:
    """Each changes logits, or is refused by a checksum."""
    model = config(layers=4)
    folder = built(RandomSource(model, SEED), tmp_path / "s").folder
    with pytest.raises(AssertionError, match=r"has other logits|is damaged"):
        assert_as_resident(two, model, parallel, Storage.FLOAT32, folder, mutant=mutant)


def test_scales_are_of_whole_rows(two: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that is quantized alone is another model."""
    model = draw_model(SEED, layers=2)
    monkeypatch.setattr(RankSource, "of_rows", lambda self, index: None)
    folder = shares_of(model, SEED, Storage.INT8, TENSOR, tmp_path / "s")
    with pytest.raises(AssertionError, match="has other logits"):
        assert_as_resident(two, model, TENSOR, Storage.INT8, folder)


def test_a_share_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    """What a folder is called does not say whose share it is."""
    folder = shares_of(config(), SEED, Storage.INT8, TENSOR, tmp_path / "s")
    shutil.rmtree(folder / "rank-1")
    shutil.copytree(folder / "rank-0", folder / "rank-1")
    with pytest.raises(CheckpointError, match="rank-1 holds rank 0 of m"):
        open_shares(folder)


def test_other_degrees_are_refused_with_the_command_that_builds_for_them(tmp_path: Path) -> None:
    """Stages and data groups are none of a store's; what cuts layers is."""
    shares = open_shares(shares_of(config(), SEED, Storage.INT8, TENSOR, tmp_path / "s"))
    whole = whole_as_shares(built(RandomSource(config(), SEED), tmp_path / "whole", Storage.INT8))
    for parallel in (TENSOR, replace(TENSOR, pipeline=2, data=3)):
        check_degrees(shares, parallel)
    for parallel in (STAGES, DATA):
        check_degrees(whole, parallel)
    for store, parallel, options in ((shares, DATA, " --data 2"), (shares, ParallelConfig(tensor=4), " --tensor 4")):
        with pytest.raises(RequestError) as refused:
            check_degrees(store, parallel)
        assert "was built for --tensor 2" in str(refused.value)
        assert f"twinfer offload build m OTHER-STORE --storage int8{options}" in str(refused.value)
    with pytest.raises(RequestError, match="built for whole layers on each rank, and --tensor 2 is asked for"):
        check_degrees(whole, TENSOR)


def test_a_build_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes, with no share written twice; and not with the shares of another build."""
    wanted = shares_of(config(), SEED, Storage.INT8, TENSOR, tmp_path / "wanted")
    told: list[str] = []
    for seed in (SEED + 1, SEED):
        monkeypatch.setattr("twinfer.offload.building._finish", _killed_at_the_second())
        with pytest.raises(KeyboardInterrupt):
            shares_of(config(), seed, Storage.INT8, TENSOR, tmp_path / "s", told.append)
        monkeypatch.undo()
    assert any("rank 1: writing" in line for line in told)
    told.clear()
    found = shares_of(config(), SEED, Storage.INT8, TENSOR, tmp_path / "s", told.append)
    assert told == []
    for path in sorted(wanted.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (found / path.relative_to(wanted)).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "wanted"]
    assert open_store(found / "rank-0").model["rank"] == 0


def _killed_at_the_second() -> Any:
    from twinfer.offload import building

    finish, calls = building._finish, []

    def finishing(*given: Any) -> int:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(*given)

    return finishing


def test_a_budget_too_small_names_the_smallest_that_works(paired: tuple[ModelConfig, Path]) -> None:
    """Of each rank; a byte less does not work."""
    model, folder = paired
    store, local = open_shares(folder).of_rank(TENSOR, 1), local_config(model, TENSOR, 0)
    given: dict[str, Any] = {"batch": 3, "reserve": 40, "compute": torch.float32, "expands": True}
    least = least_of_rank(store, local)
    assert plan_of_rank(store, local, TENSOR, 1, budget=least, **given).total_bytes <= least
    with pytest.raises(RequestError):
        plan_of_rank(store, local, TENSOR, 1, budget=least - 1, **given)
