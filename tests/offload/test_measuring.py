"""What a plan predicts follows from what was measured, and a batch is as large as hides the reads."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from twinfer.offload import measuring
from twinfer.offload.measuring import Computed, Speeds, best_batch, compute, predict
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.store import Store
from twinfer.oracle.models import RandomSource

from .small import built, config, logits, offloaded, resident, same, schedule

MODEL = replace(config(), context=4096)
SOURCE = RandomSource(MODEL, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built(SOURCE, tmp_path_factory.mktemp("measuring") / "s")


@pytest.fixture
def decoder(store: Store) -> Iterator[OffloadPath]:
    made = offloaded(store, MODEL)
    yield made
    made.close()


def test_measuring_leaves_a_path_as_it_was(decoder: OffloadPath) -> None:
    """Layers stay only while it measures: afterwards logits are right again."""
    computed = compute(decoder, 3, 20)
    assert computed.prompt_tokens == 20
    assert 0 < computed.step_s < 10
    assert computed.kv_s == 0
    steps = schedule(MODEL, 3, 0)
    assert same(logits(decoder, steps), logits(resident(SOURCE), steps))


def test_while_it_measures_each_kind_of_layer_is_read_once(decoder: OffloadPath) -> None:
    """Five equal layers and the head's blocks are two reads, and every layer is the first one."""
    state = decoder.open(1, 10)
    assert decoder._streamer is not None
    with decoder.still():
        parts = list(decoder._parts())
        read = [each.record for each in decoder.events if each.kind == "wait"]
        decoder.extend(state, [torch.tensor([1])])
    assert read == [0, len(MODEL.layers)]
    assert all(part is parts[0] for part in parts[: len(MODEL.layers)])
    assert all(part is parts[-1] for part in parts[len(MODEL.layers) :])


def test_a_prediction_is_the_longer_of_reading_and_computing(store: Store) -> None:
    """For a step and for prompts; prompts that do not go together read all weights again."""
    made = plan(store, MODEL, budget=1 << 30, batch=8, reserve=100, compute=torch.float32, expands=True)
    speeds = Speeds(disk=made.step_bytes / 2.0, memory=1.0, copies=1e12, gemm=1.0, direct=True)
    computed = Computed(step_s=0.5, prompt_s=0.125, prompt_tokens=100, kv_s=0.25)
    found = predict(made, speeds, computed)
    assert (found.step_s, found.token_s, found.hiding_tokens) == (2.25, 2.25 / 8, 32)
    assert found.prompt_token_s == 2.0 / 800
    halves = replace(made, flight_bytes=4 * made.prompt_bytes)
    assert predict(halves, speeds, computed).prompt_token_s == 4.0 / 800
    slow = replace(computed, step_s=3.0, prompt_s=1.0)
    assert predict(halves, speeds, slow).step_s == 3.0
    assert predict(halves, speeds, slow).prompt_token_s == 8.0 / 800


def chosen(
    store: Store, monkeypatch: pytest.MonkeyPatch, *, budget: int = 1 << 30, prompts: int = 10**6, kv_s: float = 0.0
) -> int:
    """Return the batch on a machine that reads the weights in 2 s, and computes a step of B in 0.1 + B / 100 s."""
    decoder = offloaded(store, MODEL, budget)

    def computed(path: OffloadPath, batch: int, reserve: int) -> Computed:
        path.plan = path._plan(batch, reserve)
        away_s = kv_s if path.plan.away_layers else 0.0
        return Computed(step_s=0.1 + batch / 100, prompt_s=1.0, prompt_tokens=reserve, kv_s=away_s)

    speeds = Speeds(
        disk=sum(record.nbytes for record in store.schedule) / 2.0, memory=1.0, copies=1e12, gemm=1.0, direct=True
    )
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "compute", computed)
        patch.setattr(measuring, "measure", lambda store: speeds)
        found = best_batch(decoder, 2048, prompts)
    decoder.close()
    return found


def test_a_batch_hides_the_reads_and_is_not_much_larger(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 190 sequences on computing takes as long as reading; fewer where there are fewer prompts, evenly."""
    assert 190 <= chosen(store, monkeypatch) <= 1.25 * 190
    assert chosen(store, monkeypatch, prompts=100) == 100
    evenly = chosen(store, monkeypatch, prompts=500)
    assert evenly == math.ceil(500 / math.ceil(500 / chosen(store, monkeypatch)))


def test_a_batch_moves_caches_to_the_disk_only_where_that_pays(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for few in memory: more than that if reading them back costs little, and not if it costs much."""
    budget = plan(
        store, MODEL, budget=1 << 30, batch=20, reserve=2048, compute=torch.float32, expands=True
    ).cache_bytes + (8 << 20)
    decoder = offloaded(store, MODEL, budget)
    here, away = (decoder.most_batch(2048, away=each) for each in (False, True))
    decoder.close()
    assert 1 < here < away < 190
    assert chosen(store, monkeypatch, budget=budget, kv_s=0.1) == away
    assert chosen(store, monkeypatch, budget=budget, kv_s=100.0) == here
