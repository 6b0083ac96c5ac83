"""What a plan predicts follows from what was measured, and a batch is as large as hides the reads."""

import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from twinfer.offload import measuring, streamer
from twinfer.offload.calls import Call
from twinfer.offload.direct import DirectFile
from twinfer.offload.kv_stream import KvStream
from twinfer.offload.measuring import (
    Prediction,
    Prompts,
    Speeds,
    Step,
    Sweep,
    best_batch,
    compute,
    compute_step,
    predict,
    sweep_s,
)
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.sequences import Away
from twinfer.offload.store import Store
from twinfer.oracle.models import RandomSource

from .small import built, config, logits, offloaded, resident, same, schedule

MODEL = replace(config(), context=4096)
SOURCE = RandomSource(MODEL, 2)
Patch = pytest.MonkeyPatch


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
    step, prompts = compute(decoder, 3, 20)
    assert (prompts.count, prompts.tokens, prompts.read_bytes) == (
        3,
        20,
        sum(each.nbytes for each in decoder.store.schedule),
    )
    assert step.kv_s == 0
    for each in (step.computing, prompts.computing):
        assert min(each.layers_s, each.head_s, each.rest_s) > 0
    steps = schedule(MODEL, 3, 0)
    assert same(logits(decoder, steps), logits(resident(SOURCE), steps))


def test_seconds_of_computing_are_divided_by_where_they_pass(decoder: OffloadPath, monkeypatch: Patch) -> None:
    """A slow head is seen in the head, slow layers in the layers, slow rows of the table in the rest."""
    clock = [0.0]
    passes = {"layer": 1.0, "score": 10.0, "enter": 100.0}
    for name, seconds in passes.items():
        plain = getattr(Call, name)

        def slow(*given: object, plain: Any = plain, seconds: float = seconds, **named: object) -> object:
            clock[0] += seconds
            return plain(*given, **named)

        monkeypatch.setattr(Call, name, slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    computing = compute_step(decoder, 1, 20).computing
    assert computing == Sweep(layers_s=len(MODEL.layers), head_s=10 * len(decoder.store.head), rest_s=100)


def test_what_is_read_back_while_it_is_timed_lies_on_the_disk(decoder: OffloadPath, monkeypatch: Patch) -> None:
    """Pages of a file that were never written cost no read: keys and values are written before they are timed."""
    monkeypatch.setattr(OffloadPath, "_away", lambda self, plan: Away(range(len(MODEL.layers)), 0))
    original, written = KvStream._read, []

    def read(self: Any, layer: int) -> None:
        for part in self._places[layer].held(self._spans):
            begin = self._places[layer].offset + part.start
            written.append(os.lseek(self._home._on_disk._descriptor, begin, os.SEEK_HOLE) > begin)
        original(self, layer)

    monkeypatch.setattr(KvStream, "_read", read)
    step = compute_step(decoder, 2, 200)
    assert step.kv_s > 0
    assert len(written) >= 2 * len(MODEL.layers)
    assert all(written)


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


def test_a_prediction_follows_reading_and_computing(store: Store) -> None:
    """The longer of the two where layers and head are alike, and the sum of the longer of each where they are not."""
    made = plan(store, MODEL, budget=1 << 30, batch=8, reserve=100, compute=torch.float32, expands=True)
    speeds = Speeds(disk=made.step_bytes / 2.0, memory=1.0, copies=1e12, gemm=1.0, direct=True)
    head_s = sum(record.nbytes for record in store.head) / speeds.disk
    layers_s = 2.0 - head_s

    def predicted(factor: float, *, kv_s: float = 0.0, rest_s: float = 0.0, together: int = 100) -> Prediction:
        """Predict where computing takes so many times as long as reading, for the layers and the head."""
        computing = Sweep(layers_s=factor * layers_s, head_s=factor * head_s, rest_s=rest_s)
        prompts = Prompts(
            computing=computing.times(1 / 4), count=2, tokens=100, together=together, read_bytes=made.step_bytes
        )
        return predict(store, made, speeds, Step(computing=computing, kv_s=kv_s), prompts)

    found = predicted(0.25, kv_s=0.25)
    assert (found.step_s, found.token_s) == pytest.approx((2.25, 2.25 / 8))
    assert found.hiding_tokens == pytest.approx(8 * 2.0 / 0.5)
    assert predicted(2.0, rest_s=0.5).step_s == pytest.approx(4.5)
    assert predicted(2.0).prompt_token_s == pytest.approx(4.0 / 800)
    assert predicted(0.25).prompt_token_s == pytest.approx(2.0 / 800)
    assert predicted(0.25, together=4).prompt_token_s == pytest.approx(4.0 / 800)
    assert predicted(8.0, together=4).prompt_token_s == pytest.approx(16.0 / 800)


def test_no_checksum_is_verified_while_the_disk_is_measured(store: Store, monkeypatch: Patch) -> None:
    """But of what is read before the measuring begins: two buffers at most."""
    verified = []
    monkeypatch.setattr(streamer, "faulty", lambda record, buffer: verified.append(record.name))
    monkeypatch.setattr(measuring, "_ENOUGH_S", 0.1)
    file = DirectFile(store.weights)
    assert measuring._disk(store, file, 2) > 0
    file.close()
    assert len(verified) <= 2 < len(store.schedule)


def test_a_sweep_waits_for_the_disk_and_for_buffers() -> None:
    """With two buffers four layers hide the reads of what follows them only as far as a buffer is free."""
    reads, uses = [1.0, 1.0, 1.0, 1.0, 8.0], [3.0, 3.0, 3.0, 3.0, 0.0]
    assert sweep_s(reads, uses, 2, 0.0) == 1 + 4 * 3 + (8 - 3)
    assert sweep_s(reads, uses, 1, 0.0) == sum(reads) + sum(uses)
    assert sweep_s(reads, uses, 5, 0.0) == max(sum(reads), sum(uses))
    assert sweep_s([1.0] * 5, [0.0] * 5, 2, 2.0) == 5.0
    assert sweep_s([1.0] * 5, [0.0] * 5, 1, 2.0) == 6.0


def chosen(store: Store, monkeypatch: Patch, *, budget: int = 1 << 30, prompts: int = 10**6, kv_s: float = 0.0) -> int:
    """Return the batch on a machine that reads the weights in 2 s, and computes a step of B in 0.1 + B / 100 s."""
    decoder = offloaded(store, MODEL, budget)

    def computed(path: OffloadPath, batch: int, reserve: int) -> Step:
        path.plan = path._plan(batch, reserve)
        computing = Sweep(layers_s=0.1 + batch / 100, head_s=0.0, rest_s=0.0)
        return Step(computing=computing, kv_s=kv_s if path.plan.away_layers else 0.0)

    speeds = Speeds(
        disk=sum(record.nbytes for record in store.schedule) / 2.0, memory=1.0, copies=1e12, gemm=1.0, direct=True
    )
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "compute_step", computed)
        patch.setattr(measuring, "measure", lambda store, slots, device: speeds)
        found = best_batch(decoder, 2048, prompts)
    decoder.close()
    return found


def test_a_batch_hides_the_reads_and_is_not_much_larger(store: Store, monkeypatch: Patch) -> None:
    """From 190 sequences on computing takes as long as reading; fewer where there are fewer prompts, evenly."""
    assert 190 <= chosen(store, monkeypatch) <= 1.25 * 190
    assert chosen(store, monkeypatch, prompts=100) == 100
    evenly = chosen(store, monkeypatch, prompts=500)
    assert evenly == math.ceil(500 / math.ceil(500 / chosen(store, monkeypatch)))


def test_a_batch_moves_caches_to_the_disk_only_where_that_pays(store: Store, monkeypatch: Patch) -> None:
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
