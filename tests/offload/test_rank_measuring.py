"""What is predicted for many ranks by what they measured, and the batch that all of them run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch

from twinfer.offload import rank_measuring
from twinfer.offload.measuring import Speeds, Step, Sweep, swept_s
from twinfer.offload.rank_measuring import Job, steps_of
from twinfer.offload.shares import build_shares, open_shares, whole_as_shares
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import ParallelConfig

from .small import built, config

TENSOR, STAGES = ParallelConfig(tensor=2), ParallelConfig(pipeline=2)
RESERVE = 60


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[ParallelConfig, Job]:
    """Return jobs of two ranks that share layers, and of two stages."""
    folder, source = tmp_path_factory.mktemp("jobs"), RandomSource(config(), 7)
    given = {"model": {"name": "m"}, "files": {}, "identity": 1, "report": lambda line: None}
    build_shares(source, folder / "two", Storage.FLOAT32, TENSOR, **given)  # type: ignore[arg-type]
    stores = {TENSOR: open_shares(folder / "two"), STAGES: whole_as_shares(built(source, folder / "one"))}
    budget = 2 << 20
    return {each: Job(stores[each], config(), each, budget, 0, torch.float32, True) for each in stores}


def reading(job: Job, seconds: float, batch: int = 4) -> Speeds:
    """Return speeds by which all ranks together read so long in a step."""
    disk = sum(each.step_bytes for each in job.plans(batch, RESERVE)) / seconds
    return Speeds(disk=disk, memory=1.0, copies=1e15, gemm=1.0, direct=True)


def predicted(job: Job, speeds: Speeds, step: Sequence[Step]) -> float:
    return job.predict(4, RESERVE, speeds, step, None).step_s


def alike(job: Job, seconds: float) -> list[Step]:
    """Return steps in which each rank's records take as long to compute with as their bytes are many."""
    steps = []
    for rank in range(job.parallel.ranks):
        store = job.shares.of_rank(job.parallel, rank)
        head = sum(record.nbytes for record in store.head) / sum(record.nbytes for record in store.schedule)
        steps.append(Step(computing=Sweep(layers_s=(1 - head) * seconds, head_s=head * seconds, rest_s=0.0), kv_s=0.0))
    return steps


def assert_ranks_share_the_disk(job: Job) -> None:
    for computing_s in (0.5, 2.0, 5.0):
        found = predicted(job, reading(job, 2.0), alike(job, computing_s))
        assert found == pytest.approx(max(2.0, computing_s))


def test_ranks_that_share_layers_share_the_disk(jobs: dict[ParallelConfig, Job]) -> None:
    """A step takes the longer of what all of them read and what the slowest computes."""
    assert_ranks_share_the_disk(jobs[TENSOR])


def assert_stages_follow_each_other(job: Job) -> None:
    stages = [(3.0, 0.0, 6.0), (4.0, 1.0, 4.0)]
    step = steps_of([[round(each * 1e9) for each in (*stage, 0.0)] for stage in stages])
    assert predicted(job, reading(job, 1e-6), step) == pytest.approx(3 + 5 + 1)
    assert job.computed_s(step) == pytest.approx(3 + 5 + 1)
    assert predicted(job, reading(job, 2.0), alike(job, 1e-6)) == pytest.approx(2.0, abs=1e-5)


def test_stages_follow_each_other(jobs: dict[ParallelConfig, Job]) -> None:
    """Computing adds up, as do reads, for which each has the disk for itself; what is neither's counts once."""
    assert_stages_follow_each_other(jobs[STAGES])


def assert_batch_hides_reads(job: Job, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Job, "speeds", lambda self, plan: reading(job, 6.0))
    told: list[int] = []

    @cache
    def measured(batch: int, reserve: int, tokens: int) -> list[list[int]]:
        told.append(batch)
        return [[batch * 10**9, 0, 0, 0]] * 2

    assert job.best_batch(measured, RESERVE, 1000) == 7
    assert told == [4, 7]
    most = job.most_batch(RESERVE, 1000, away=False)
    job.plans(most, RESERVE)
    patch.setattr(Job, "speeds", lambda self, plan: reading(job, 6e6))
    assert job.best_batch(measured, RESERVE, 10**6) <= job.most_batch(RESERVE, 10**6, away=True)


def test_the_batch_hides_what_all_ranks_read(jobs: dict[ParallelConfig, Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of 6 seconds are hidden by 6 tokens of a second each, and a tenth more; no rank's budget is exceeded."""
    assert_batch_hides_reads(jobs[TENSOR], monkeypatch)


def whole_layers(job: Job, batch: int) -> bool:
    """Return whether every rank has room for a batch, whose keys and values are not attended to in blocks."""
    try:
        return not any(each.block_tokens for each in job.plans(batch, RESERVE))
    except RequestError:
        return False


def test_a_budget_too_small_for_a_rank_names_what_all_need(jobs: dict[ParallelConfig, Job]) -> None:
    """The last stage, which has the head, needs another budget than the first; a byte less than said does not work."""
    job = jobs[STAGES]
    with pytest.raises(RequestError, match="the smallest that works is") as refused:
        replace(job, budget=1000).plans(3, RESERVE)
    least = int(str(refused.value).rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))
    replace(job, budget=least).plans(3, RESERVE)
    with pytest.raises(RequestError):
        replace(job, budget=least - 1).plans(3, RESERVE)


@pytest.mark.parametrize("parallel", [TENSOR, STAGES], ids=["tensor", "stages"])
def test_the_largest_batch_fits_every_rank(jobs: dict[ParallelConfig, Job], parallel: ParallelConfig) -> None:
    """One more does not; and with no layer's keys and values in a file it is smaller."""
    job = jobs[parallel]
    here, most = (job.most_batch(RESERVE, 10**6, away=away) for away in (False, True))
    assert 1 < here <= most
    assert not any(each.away_layers for each in job.plans(here, RESERVE))
    assert whole_layers(job, most)
    assert not whole_layers(job, most + 1)
    assert job.most_batch(RESERVE, 3, away=True) == 3


def test_seeded_faults_of_predictions_are_caught(
    jobs: dict[ParallelConfig, Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that each rank has for itself, stages at the same time, and a batch without a margin."""
    with monkeypatch.context() as patch:
        patch.setattr(
            rank_measuring,
            "swept_s",
            lambda store, plan, read, kv_s, speeds, computing: swept_s(
                store, plan, read, kv_s, replace(speeds, disk=2 * speeds.disk), computing
            ),
        )
        with pytest.raises(AssertionError):
            assert_ranks_share_the_disk(jobs[TENSOR])
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_stages", lambda self, steps: [[each.computing for each in steps]])
        with pytest.raises(AssertionError):
            assert_stages_follow_each_other(jobs[STAGES])
    with monkeypatch.context() as patch:
        patch.setattr(rank_measuring, "MARGIN", 1.0)
        with pytest.raises(AssertionError):
            assert_batch_hides_reads(jobs[TENSOR], patch)
