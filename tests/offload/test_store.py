"""Stores: whole or not at all, gone on with after a kill, and refused where a byte is wrong."""

import contextlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twinfer.offload import building
from twinfer.offload import store as store_module
from twinfer.offload.building import build
from twinfer.offload.rank_source import RankSource
from twinfer.offload.shares import build_shares
from twinfer.offload.store import DESCRIPTION, WEIGHTS, check, open_store
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Head, Storage
from twinfer.spec.counts import total
from twinfer.spec.errors import CheckpointError, RequestError
from twinfer.spec.parallel import ParallelConfig
from twinfer.spec.shard import Shard
from twinfer.spec.weights import LayerWeights

from .small import built, config, contents, logits, mixtures, offloaded, schedule

SOURCE = RandomSource(config(), 7)
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("head", [Head.TIED, Head.UNTIED])
def test_records_are_pages_that_do_not_overlap(storage: Storage, head: Head, tmp_path: Path) -> None:
    """Each begins where the one before ends, tensors within are aligned to 64 bytes, and all checksums hold."""
    store = built(RandomSource(config(head=head), 0), tmp_path / "s", storage)
    records = sorted(store.records, key=lambda record: record.offset)
    end = 0
    for record in records:
        assert record.offset == end
        end += record.nbytes
        assert record.nbytes % 4096 == 0
        inner = 0
        for tensor in record.tensors():
            assert tensor.offset >= inner
            assert tensor.offset % 64 == 0
            inner = tensor.offset + tensor.nbytes
        assert inner <= record.nbytes
    assert end == store.weights.stat().st_size
    assert (store.table is store.head) == (head is Head.TIED)
    check(store)


def test_any_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    """By the check, and by whoever runs it, before an answer: layer and tensor."""
    store = built(SOURCE, tmp_path / "s", Storage.INT8)
    pick = random.Random(0)
    steps = schedule(config(), 2, 0)
    for record in pick.sample(store.records, 8):
        tensor = pick.choice([each for each in record.tensors() if each.nbytes])
        place = record.offset + tensor.offset + pick.randrange(tensor.nbytes)
        with store.weights.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << pick.randrange(8)]))
        with pytest.raises(CheckpointError, match=f"{record.name}, {tensor.name} is damaged"):
            check(store)
        if record in (store.resident, *store.schedule):
            with pytest.raises(CheckpointError, match=f"{record.name}, {tensor.name} is damaged"):
                logits(offloaded(store, config()), steps)
        with store.weights.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    check(store)


def test_a_damaged_row_of_the_table_is_found_when_it_is_looked_up(tmp_path: Path) -> None:
    """A table that is not the head is never streamed, so each of its blocks has a checksum."""
    store = built(SOURCE, tmp_path / "s")
    steps = schedule(config(), 1, 0)
    word = store.table[0].tensors()[0]
    token, rows = int(steps[0][0][0]), word.shape[0]
    record = store.table[token // rows]
    with store.weights.open("r+b") as file:
        file.seek(record.offset + word.offset + token % rows * word.nbytes // rows)
        file.write(b"\xff" * 4)
    with pytest.raises(CheckpointError, match=r"table rows .* is damaged"):
        logits(offloaded(store, config()), steps)


def test_truncated_and_foreign_stores_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """When they are opened, with what would be right; a foreign one with the command that builds it anew."""
    store = built(SOURCE, tmp_path / "s")
    os.truncate(store.weights, store.nbytes - 4096)
    with pytest.raises(CheckpointError, match=f"must have {store.nbytes:,}"):
        open_store(store.folder)
    os.truncate(store.weights, store.nbytes)
    for key, value in (("rows of a block", 4), ("torch", "1.0"), ("format", 0), ("processor", "abacus")):
        other = {**store_module.layout(), key: value}
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "layout", lambda other=other: other)
            with pytest.raises(CheckpointError, match=f"for {key}.*twinfer offload build m .*--storage float32"):
                open_store(store.folder)
    description = store.folder / DESCRIPTION
    text = description.read_text()
    for damaged in (text[:-20], text.replace('"nbytes": ', '"nbytes": 1', 1), "[]", "", "\xff"):
        assert damaged != text
        description.write_text(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            open_store(store.folder)
    store.weights.unlink()
    description.write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_store(store.folder)


def places(parts: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where the values of a description are."""
    yield path
    if isinstance(parts, dict | list):
        for key in parts if isinstance(parts, dict) else range(len(parts)):
            yield from places(parts[key], (*path, key))


def test_a_description_that_no_build_makes_is_refused(tmp_path: Path) -> None:
    """Also under a digest that is right, before anything is read by it: values of other types.

    What it says of the model is for whoever built it, and for `layout` are the tests above.
    """
    store = built(RandomSource(mixtures(2, 2, 1), 0), tmp_path / "s", Storage.INT8)
    description = store.folder / DESCRIPTION
    parts = json.loads(description.read_bytes())
    del parts["sha256"]
    pick = random.Random(0)
    kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    accepted = []
    for place in places(parts):
        if len(place) > 1 and place[0] not in ("model", "layout"):
            kinds.setdefault(tuple(0 if isinstance(key, int) else key for key in place), []).append(place)
    assert len(kinds) > 100
    for kind, of_kind in kinds.items():
        for wrong in pick.sample(["x", {}, [[0]], True, -1, 1.5], 3):
            changed = json.loads(json.dumps(parts))
            inner, place = changed, pick.choice(of_kind)
            for key in place[:-1]:
                inner = inner[key]
            if (wrong == "x" and kind[-1] == "name") or inner[place[-1]] == wrong:
                continue
            inner[place[-1]] = wrong
            description.write_text(json.dumps({"sha256": store_module._digest(changed), **changed}))
            with contextlib.suppress(CheckpointError):
                open_store(store.folder)
                accepted.append((place, wrong))
    assert not accepted


class Killed(BaseException):
    """What a kill is within a process."""


@contextlib.contextmanager
def failing_at(moment: int, error: BaseException, monkeypatch: Patch) -> Iterator[list[int]]:
    """Raise when something is brought to the disk for the moment-th time; yields a list of what was brought."""
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == moment:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(building.os, "fsync", sync)
        yield synced


def killed_at(moment: int, folder: Path, monkeypatch: Patch) -> bool:
    """Build, and be killed when something is brought to the disk for the moment-th time; returns whether that came."""
    with failing_at(moment, Killed(), monkeypatch) as synced, contextlib.suppress(Killed):
        built(SOURCE, folder)
    return len(synced) == moment


class Faulty(RandomSource):
    """A source of which the last layer cannot be read."""

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        if index == len(self.config.layers) - 1:
            raise CheckpointError("layer 4 is damaged")
        return super().layer(index, shard)


FAILURES: dict[str, tuple[RandomSource, int | None, BaseException | None, str | None]] = {
    "no room": (SOURCE, 0, None, "make room"),
    "disk full before the first record is there": (SOURCE, 1, OSError(28, "No space left"), "written: No space left$"),
    "interrupted before the first record is there": (SOURCE, 1, KeyboardInterrupt(), None),
    "damaged source": (Faulty(config(), 7), None, None, "layer 4 is damaged"),
}


@pytest.mark.parametrize("parallel", [None, ParallelConfig(tensor=2)], ids=["one rank", "two ranks"])
@pytest.mark.parametrize("failure", list(FAILURES))
def test_a_failed_build_leaves_nothing(
    failure: str, parallel: ParallelConfig | None, tmp_path: Path, monkeypatch: Patch
) -> None:
    """No folder, hidden or not, where there is nothing that a later run could go on from."""
    source, moment, error, message = FAILURES[failure]
    given: dict[str, Any] = {"model": {"name": "m"}, "files": {}, "identity": 1, "report": lambda line: None}
    if moment == 0:
        monkeypatch.setattr(building.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    failing = failing_at(moment, error, monkeypatch) if moment and error else nullcontext()
    make = build if parallel is None else partial(build_shares, parallel=parallel)
    with failing, pytest.raises((RequestError, CheckpointError, KeyboardInterrupt), match=message):
        make(source, tmp_path / "s", Storage.FLOAT32, **given)
    assert not list(tmp_path.iterdir())


def test_ranks_stores_without_room_are_refused_before_the_first(tmp_path: Path, monkeypatch: Patch) -> None:
    """All shares count, not the next one only."""
    parallel = ParallelConfig(tensor=2)
    needed = sum(
        total(RankSource(SOURCE, parallel, rank, Storage.FLOAT32, {}).config).bytes(Storage.FLOAT32) for rank in (0, 1)
    )
    monkeypatch.setattr(building.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    given: dict[str, Any] = {"model": {"name": "m"}, "files": {}, "identity": 1, "report": lambda line: None}
    with pytest.raises(RequestError, match=f"has {needed - 1:,} bytes free; the store takes {needed:,} more"):
        build_shares(SOURCE, tmp_path / "s", Storage.FLOAT32, parallel, **given)
    assert not list(tmp_path.iterdir())


def test_a_build_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: Patch) -> None:
    """At each moment, whatever was half written: the same to the byte, no record twice, and no store before its end."""
    whole = built(SOURCE, tmp_path / "whole")
    expected, given = contents(tmp_path / "whole"), {"model": {"name": "m"}, "files": {}, "identity": 1}
    monkeypatch.setattr(building.os, "fsync", lambda descriptor: None)
    for moment in itertools.count(1):
        folder, partial = tmp_path / f"s{moment}", tmp_path / f".s{moment}.partial"
        if not killed_at(moment, folder, monkeypatch):
            break
        if not folder.exists():
            lines = (partial / "journal").read_text().split("\n")
            with (partial / "journal").open("a") as file:
                file.write('["layers", {"name": "la')
            told: list[str] = []
            build(SOURCE, folder, Storage.FLOAT32, **given, report=told.append)  # type: ignore[arg-type]
            assert len(told) == len(whole.records) - (len(lines) - 2)
        assert contents(folder) == expected
        assert not partial.exists()
    assert moment > 2 * len(whole.records) + 1


def test_a_full_disk_is_said_and_gone_on_with(tmp_path: Path) -> None:
    """A write that the system refuses, in the midst of a record: the next build goes on, to the same bytes."""
    built(SOURCE, tmp_path / "whole")
    size = (tmp_path / "whole" / WEIGHTS).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(
            RequestError, match=r"cannot be written: File too large; [1-9]\d* of \d+ records are kept: run"
        ):
            built(SOURCE, tmp_path / "s")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    built(SOURCE, tmp_path / "s")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: Patch) -> None:
    """With how much more it takes; of a build that goes on only what is missing counts."""
    monkeypatch.setattr(building.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(
        RequestError, match=r"has 1,000 bytes free; the store takes [\d,]{6,} more in float32: make room"
    ):
        built(SOURCE, tmp_path / "s")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert killed_at(30, tmp_path / "s", monkeypatch)
    there = (tmp_path / ".s.partial" / WEIGHTS).stat().st_size
    needed = total(config()).bytes(Storage.FLOAT32) - there
    assert needed > 0
    for free in (needed - 1, needed):
        monkeypatch.setattr(building.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        refused = pytest.raises(RequestError, match=f"takes {needed:,} more") if free < needed else nullcontext()
        with refused:
            built(SOURCE, tmp_path / "s")


def test_what_is_left_of_another_model_is_not_gone_on_with(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its records would be of other weights."""

    given: dict[str, Any] = {"model": {"name": "m"}, "files": {}, "report": lambda line: None}
    with (
        failing_at(3, OSError(28, "No space left on device"), monkeypatch),
        pytest.raises(RequestError, match=r"No space left on device; 1 of .* records are kept: run the same"),
    ):
        build(RandomSource(config(), 8), tmp_path / "s", Storage.FLOAT32, identity=2, **given)
    build(SOURCE, tmp_path / "s", Storage.FLOAT32, identity=1, **given)
    built(SOURCE, tmp_path / "whole")
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_two_builds_of_one_store_do_not_mix(tmp_path: Path) -> None:
    """The second is refused while the first holds the lock; and so is a store that is there."""
    partial = tmp_path / ".s.partial"
    partial.mkdir()
    holder = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(RequestError, match="being built by another process"):
            built(SOURCE, tmp_path / "s")
        process.kill()
    built(SOURCE, tmp_path / "s")
    with pytest.raises(RequestError, match="is there already"):
        built(SOURCE, tmp_path / "s")
