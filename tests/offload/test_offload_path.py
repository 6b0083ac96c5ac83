"""The offloading path gives what the compiled path gives, to the bit; and what breaks it is seen."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from twinfer.compiled.linear import multiplies_fast
from twinfer.offload import calls, cutting, form, passes, path, streamer, table
from twinfer.offload.copies import Staged, ThreadLane
from twinfer.offload.direct import DirectFile
from twinfer.offload.form import Resident
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.sequences import Away
from twinfer.offload.store import Store
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import Head, ModelConfig, Storage
from twinfer.spec.errors import RequestError

from .small import BUDGET, built, config, logits, offloaded, resident, same, schedule

cases = drawn(
    lambda pick: (
        draw_model_config(pick, context=40),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.integer(1, 7),
        pick.choice([1, 2, 3, 4]),
        pick.choice([64, 4096, 1 << 22]),
        pick.choice([False, True]),
        pick.choice([2, 3, 512]),
        pick.choice([0, 2**16 - 1, pick.integer(0, 2**16 - 1)]),
        pick.choice([1, cutting.LEAST]),
        pick.choice([0, pick.integer(0, 1 << 18), 1 << 30]),
        pick.choice([False, True]),
    )
)


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(case=cases)
def test_logits_are_those_of_the_compiled_path_to_the_bit(
    case: tuple[ModelConfig, int, Storage, int, int, int, bool, int, int, int, int, bool],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """For drawn configs, storages, batches, buffers, sizes of reads, and layers whose keys and values lie in a file.

    The calls of a step go in one sweep or several; a dense layer is one record or several. Any
    part of the records stays in DRAM; and bytes get into the buffers by themselves or by a lane, from host buffers.
    """
    model, seed, storage, batch, slots, piece, every, flight, away, least, room, lane = case
    source = RandomSource(model, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "LEAST", least)
        store = built(source, tmp_path_factory.mktemp("store") / "s", storage)
    steps = schedule(model, batch, seed)
    every = every and multiplies_fast(torch.zeros(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            path, "Streamer", lambda *given: Streamer(*given[:2], slots, *given[3:], piece=max(piece, form.PAGE))
        )
        patch.setattr(passes, "call_bytes", lambda *given: BUDGET // flight)
        moved = [index for index in range(len(model.layers)) if away >> index & 1]
        patch.setattr(path.OffloadPath, "_away", lambda self, plan: Away(moved, 0))
        if lane:
            patch.setattr(path, "copies_for", lambda device: Staged(ThreadLane()))
        decoder = OffloadPath(store, model, budget=BUDGET, dram_budget=room, mode="eager")
        found = logits(decoder, steps, every=every)
        decoder.close()
    assert same(found, logits(resident(source, storage), steps, every=every))


def _released_before_use(self: Streamer) -> Iterator[Any]:
    reading = self._reading
    for index in range(len(reading.records)):
        ticket = self._wait(index)
        with reading.changed:
            reading.ring.release(ticket)
            reading.claim()
            while reading.left:
                reading.changed.wait()
        yield self._part(index, reading.ring.slot(ticket))


def _not_waited(self: Streamer, index: int) -> int:
    ring = self._reading.ring
    with self._reading.changed:
        ticket = ring._next_taken
        ring._next_taken += 1
    return ticket


def _slow(original: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*given: Any) -> Any:
        time.sleep(0.02)
        return original(*given)

    return slow


def _mutants() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def swapped(patch: pytest.MonkeyPatch) -> None:
        original = path.read_resident

        def read(file: DirectFile, store: Store) -> Resident:
            first, second, *others = store.layers
            object.__setattr__(store, "layers", (second, first, *others))
            return original(file, store)

        patch.setattr(path, "read_resident", read)

    def not_waited(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(streamer._Reading, "_read", _slow(streamer._Reading._read))
        patch.setattr(streamer.Streamer, "_wait", _not_waited)
        patch.setattr(streamer.Streamer, "_restart", lambda self: None)

        def sweep(self: Streamer) -> Iterator[Any]:
            for index in range(len(self._reading.records)):
                yield self._part(index, self._reading.ring.slot(self._wait(index)))

        patch.setattr(streamer.Streamer, "sweep", sweep)

    def offset_dropped(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            form,
            "in_buffer",
            lambda record, buffer: form.rebuilt(
                record.form,
                lambda placed: torch.frombuffer(buffer[: placed.nbytes], dtype=placed.dtype).view(placed.shape),
            ),
        )
        patch.setattr(streamer, "in_buffer", form.in_buffer)

    def piece_misplaced(patch: pytest.MonkeyPatch) -> None:
        def read(self: Any, piece: Any) -> None:
            record, host = self.records[piece.record], self._host(piece)
            self.file.read_into(host[piece.begin : piece.end], record.offset, record.name)

        patch.setattr(streamer._Reading, "_read", read)
        patch.setattr(streamer._Reading, "_verify", lambda self, piece: True)
        patch.setattr(path, "Streamer", lambda *given: Streamer(*given, piece=form.PAGE))

    def stale_rows(patch: pytest.MonkeyPatch) -> None:
        original = table.DiskTable._fetch
        blocks: list[int] = []

        def fetch(self: Any, block: int, targets: Any) -> None:
            blocks.append(block)
            original(self, blocks[0], targets)

        patch.setattr(table.DiskTable, "_fetch", fetch)

    def wrong_cache(patch: pytest.MonkeyPatch) -> None:
        original = calls.Call.layer
        first: list[Any] = []

        def layer(self: Any, config: Any, weights: Any, cache: Any, place: Any) -> None:
            first.append(cache)
            original(self, config, weights, first[0], place)

        patch.setattr(calls.Call, "layer", layer)

    def blocks_reversed(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(calls.Call, "logits", lambda self, vocabulary: torch.cat(self._blocks[::-1], 1)[:, :vocabulary])

    return {
        "buffer reused too early": lambda patch: patch.setattr(streamer.Streamer, "sweep", _released_before_use),
        "layer order swapped": swapped,
        "missing wait": not_waited,
        "offset dropped": offset_dropped,
        "piece misplaced": piece_misplaced,
        "stale rows of the table": stale_rows,
        "another layer's cache": wrong_cache,
        "head's blocks reversed": blocks_reversed,
    }


def _agrees(folder: Path) -> bool:
    model = config(head=Head.UNTIED)
    source = RandomSource(model, 3)
    store = built(source, folder)
    steps = schedule(model, 3, 3)
    decoder = offloaded(store, model)
    try:
        return same(logits(decoder, steps), logits(resident(source), steps))
    finally:
        decoder.close()


def test_the_case_that_mutants_are_tried_on_holds(tmp_path: Path) -> None:
    """Without a mutant it agrees, so what a mutant changes is the mutant's."""
    assert _agrees(tmp_path / "s")


@pytest.mark.parametrize("mutant", list(_mutants()))
def test_mutants_are_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each changes the logits."""
    _mutants()[mutant](monkeypatch)
    assert not _agrees(tmp_path / "s")


def test_a_budget_too_small_names_the_smallest_that_works(tmp_path: Path) -> None:
    """What the message names works, and a byte less does not."""
    model = config()
    store = built(RandomSource(model, 0), tmp_path / "s")
    given = {"batch": 3, "reserve": 20, "compute": torch.float32, "expands": True}
    with pytest.raises(RequestError, match="the smallest that works is") as refused:
        plan(store, model, budget=1000, **given)
    least = int(str(refused.value).rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))
    assert plan(store, model, budget=least, **given).total_bytes == least
    with pytest.raises(RequestError):
        plan(store, model, budget=least - 1, **given)
    larger = plan(store, model, budget=1 << 30, **given)
    assert least < larger.total_bytes <= 1 << 30


def test_open_refuses_what_the_budget_has_no_room_for(tmp_path: Path) -> None:
    """Before anything is allocated, and the path is as it was."""
    model = config()
    source = RandomSource(model, 0)
    store = built(source, tmp_path / "s")
    decoder = offloaded(store, model, budget=2_000_000)
    with pytest.raises(RequestError, match="the smallest that works"):
        decoder.open(10_000, 60)
    steps = schedule(model, 2, 0)
    assert same(logits(decoder, steps), logits(resident(source), steps))
    decoder.close()
