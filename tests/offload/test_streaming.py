"""Reading ahead: in order, while others are computed with; and what becomes of reads that fail."""

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from twinfer.offload.direct import DirectFile
from twinfer.offload.events import Kind, at_once, overlap_s, seconds
from twinfer.offload.form import PAGE, Record, bytes_of, in_buffer, pages
from twinfer.offload.store import Store
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource
from twinfer.spec.errors import CheckpointError, RequestError

from .small import built, config, logits, mixtures, offloaded, schedule


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built(RandomSource(config(layers=6), 1), tmp_path_factory.mktemp("streaming") / "s")


def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    time.sleep(0.01)
    return os.preadv(descriptor, buffers, offset)


def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
    time.sleep(0.001)
    return os.preadv(descriptor, buffers, offset)


def test_each_sweep_yields_every_record_in_order(store: Store) -> None:
    """Its tensors are those of the record, read by themselves, sweep after sweep, with any number of buffers."""
    file = DirectFile(store.weights)
    for slots in (1, 2, 5):
        streamer = Streamer(file, store.schedule, slots, piece=PAGE)
        for _ in range(2):
            for record, part in zip(store.schedule, streamer.sweep(), strict=True):
                alone = memoryview(bytearray(pages(record.nbytes)))
                with store.weights.open("rb") as plain:
                    plain.seek(record.offset)
                    plain.readinto(alone)
                expected = in_buffer(record, alone)
                leaves = zip(
                    torch.utils._pytree.tree_leaves(part), torch.utils._pytree.tree_leaves(expected), strict=True
                )
                for found, right in leaves:
                    assert not isinstance(right, torch.Tensor) or bytes_of(found) == bytes_of(right)
        streamer.close()
    file.close()


def test_reading_overlaps_computing(store: Store) -> None:
    """With two buffers most of the time of the reads lies within that of the computation; with one, none does."""
    shares = {}
    for slots in (1, 2):
        streamer = Streamer(DirectFile(store.weights, read=slow), store.schedule, slots)
        for _ in range(2):
            for _part in streamer.sweep():
                time.sleep(0.015)
        streamer.close()
        shares[slots] = overlap_s(streamer.events) / seconds(streamer.events, Kind.READ)
    assert shares[1] < 0.1
    assert shares[2] > 0.6


def test_one_thread_reads_while_computing_is_ahead(store: Store) -> None:
    """Where each use takes longer than its reads, no two reads go on at once; where uses take no time, several do."""
    together = {}
    for use_s in (0.02, 0.0):
        streamer = Streamer(DirectFile(store.weights, read=short), store.schedule, 4, piece=PAGE)
        for sweep in range(2):
            for _part in streamer.sweep():
                time.sleep(use_s)
            if sweep == 0:
                before = len(streamer.events)
        together[use_s] = at_once(streamer.events[before:], Kind.READ)
        streamer.close()
    assert together[0.02] == pytest.approx(1)
    assert together[0.0] > 2


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_are_continued(store: Store, direct: bool) -> None:
    """A read that returns less than was asked for is gone on with where it stopped."""

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:PAGE]], offset)

    streamer = Streamer(DirectFile(store.weights, direct=direct, read=short), store.schedule, 2)
    assert len(list(streamer.sweep())) == len(store.schedule)
    streamer.close()


def test_a_failed_read_names_its_record_and_the_next_sweep_begins_anew(store: Store) -> None:
    """The error comes where the record is next; afterwards all is as before."""
    bad = store.layers[3]
    failing = True

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if failing and offset == bad.offset:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    streamer = Streamer(DirectFile(store.weights, read=read), store.schedule, 2)
    seen: list[object] = []
    with pytest.raises(CheckpointError, match="layer 3 cannot be read: Input/output error"):
        seen.extend(streamer.sweep())
    assert len(seen) == 3
    failing = False
    assert len(list(streamer.sweep())) == len(store.schedule)
    streamer.close()


def test_a_sweep_that_is_left_is_begun_anew(store: Store) -> None:
    """By an exception in the computation, say; the next one yields the first record first."""
    streamer = Streamer(DirectFile(store.weights, read=slow), store.schedule, 3)
    for index, _ in enumerate(streamer.sweep()):
        if index == 2:
            break
    first = next(iter(streamer.sweep()))
    expected = in_buffer(store.layers[0], _bytes(store, 0))
    assert bytes_of(first.qkv.word) == bytes_of(expected.qkv.word)
    streamer.close()


def test_a_removed_store_is_read_on_and_a_shortened_one_refused(tmp_path: Path) -> None:
    """The open file lives on after its name is gone; where its end is cut off, the record that it lacks is named."""
    store = built(RandomSource(config(), 1), tmp_path / "s")
    streamer = Streamer(DirectFile(store.weights), store.schedule, 2)
    list(streamer.sweep())
    os.truncate(store.weights, store.layers[4].offset)
    store.weights.unlink()
    with pytest.raises(CheckpointError, match="layer 4 ends early, 0 of its"):
        list(itertools.chain(streamer.sweep(), streamer.sweep()))
    streamer.close()


def test_a_closed_streamer_says_so(store: Store) -> None:
    """Instead of waiting for reads that nobody does."""
    streamer = Streamer(DirectFile(store.weights), store.schedule, 2)
    streamer.close()
    streamer.close()
    with pytest.raises(RequestError, match="closed"):
        list(itertools.chain(streamer.sweep(), streamer.sweep()))


def _bytes(store: Store, index: int) -> memoryview:
    record = store.layers[index]
    with store.weights.open("rb") as file:
        file.seek(record.offset)
        return memoryview(bytearray(file.read(record.nbytes)))


@pytest.mark.parametrize("owner", ["streamer", "expert_cache"])
def test_an_unforeseen_error_of_a_reading_thread_ends_the_step(
    owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised where the record is waited for: a thread that ended silently would leave the step waiting."""
    model = mixtures(2)
    path = offloaded(built(RandomSource(model, 0), tmp_path / "s"), model)

    def faulty(record: Record, buffer: memoryview) -> str | None:
        raise ZeroDivisionError(record.name)

    monkeypatch.setattr(f"twinfer.offload.{owner}.faulty", faulty)
    step = ThreadPoolExecutor(1).submit(logits, path, schedule(model, 2, 0))
    with pytest.raises(ZeroDivisionError, match="layer"):
        step.result(timeout=20)
