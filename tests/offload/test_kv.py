"""Keys and values in a file: as if they were in memory, within a smaller budget; and what breaks it is seen."""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from twinfer.offload import calls, kv_blocks, kv_file, kv_stream, sequences
from twinfer.offload.events import Kind
from twinfer.offload.kv_blocks import KvBlocks
from twinfer.offload.kv_file import KvFile
from twinfer.offload.kv_stream import KvStream, away_layers, joined
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import Plan, plan
from twinfer.offload.sequences import Away
from twinfer.offload.store import Store
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import Storage
from twinfer.spec.errors import CheckpointError, RequestError, TwinferError

from .small import built, config, resident, same, tiny_pages

MODEL = replace(config(layers=6), context=600)
SOURCE = RandomSource(MODEL, 11)
RESERVE = 512


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built(SOURCE, tmp_path_factory.mktemp("kv") / "s")


def planned(store: Store, budget: int, reserve: int = RESERVE) -> Plan:
    given = {"batch": 4, "reserve": reserve, "compute": torch.float32, "expands": True}
    return plan(store, MODEL, budget=budget, **given)


def least(store: Store, reserve: int = RESERVE) -> int:
    """Return the smallest budget that works."""
    with pytest.raises(RequestError) as refused:
        planned(store, 1000, reserve)
    return int(str(refused.value).rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))


def whole(store: Store, reserve: int = RESERVE) -> int:
    """Return the smallest budget with which layers are brought in whole."""
    smallest = least(store, reserve)
    return next(b for b in range(smallest, 1 << 40, 16 << 10) if planned(store, b, reserve).block_tokens == 0)


def steps(batch: int = 4) -> list[list[Tensor]]:
    """Return prompts of several lengths, and steps of all and of some sequences."""
    generator = torch.Generator().manual_seed(1)
    counts = [[40 * row + 3 for row in range(batch)], *[[1] * batch] * 3, [0, 1, 5, 0][:batch], [1] * batch]
    return [[torch.randint(MODEL.vocabulary, (n,), generator=generator) for n in each] for each in counts]


def found(store: Store, budget: int, given: list[list[Tensor]], reserve: int = RESERVE) -> tuple[list[Tensor], Plan]:
    decoder = OffloadPath(store, MODEL, budget=budget, mode="eager")
    try:
        state = decoder.open(len(given[0]), reserve)
        result = [decoder.extend(state, step) for step in given]
        state.close()
        assert decoder.plan is not None
        return result, decoder.plan
    finally:
        decoder.close()


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    decoder = resident(SOURCE)
    state = decoder.open(4, RESERVE)
    return [decoder.extend(state, step) for step in steps()]


def test_layers_move_away_as_the_budget_shrinks(store: Store, expected: list[Tensor]) -> None:
    """None while all fits; then no more than must; every plan keeps its budget, and the logits are the same."""
    smallest = whole(store)
    everything = next(b for b in range(smallest, 1 << 40, 64 << 10) if planned(store, b).away_layers == 0)
    counts = []
    for part in range(5):
        budget = smallest + (everything - smallest) * part // 4
        made = planned(store, budget)
        assert made.total_bytes <= budget
        counts.append(made.away_layers)
        logits_found, used = found(store, budget, steps())
        assert used.away_layers == made.away_layers
        assert same(logits_found, expected)
    assert counts[0] == len(MODEL.layers)
    assert counts[-1] == 0
    assert sorted(counts, reverse=True) == counts
    assert len(set(counts)) > 2


def test_what_grows_past_its_reserve_moves_away(store: Store, expected: list[Tensor]) -> None:
    """Sequences that are opened for few tokens begin in memory; growing they are copied, whatever lies where."""
    budget = whole(store, 246)
    assert planned(store, budget, 60).away_layers == 0
    result, used = found(store, budget, steps(), reserve=60)
    assert used.reserve == 246
    assert used.away_layers == len(MODEL.layers)
    assert same(result, expected)


def test_reading_goes_on_behind_the_computation(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next layer's keys and values are read while one is computed with, and written behind."""
    monkeypatch.setattr(calls.Call, "layer", _slow(calls.Call.layer, 0.05))
    decoder = OffloadPath(store, MODEL, budget=whole(store), mode="eager")
    state = decoder.open(4, RESERVE)
    for step in steps()[:2]:
        decoder.extend(state, step)
    events = decoder.events
    decoder.close()
    reads = [each for each in events if each.kind is Kind.KV_READ][-6:]
    uses = [each for each in events if each.kind is Kind.USE and each.record < 6][-6:]
    writes = [each for each in events if each.kind is Kind.KV_WRITE][-6:]
    for index in range(6):
        assert reads[index].record == uses[index].record == writes[index].record == index
        assert reads[index].end_s <= uses[index].end_s
        assert uses[index].begin_s <= writes[index].begin_s
    for index in range(2, 6):
        assert writes[index - 2].end_s <= reads[index].begin_s  # the buffer is free
    assert sum(reads[index].end_s <= uses[index - 1].end_s for index in range(2, 6)) >= 3  # but for a slow disk all


def test_no_file_is_left(store: Store) -> None:
    """It has no name from the beginning, so nothing is left, however the process ends."""
    before = set(os.listdir(store.folder))
    decoder = OffloadPath(store, MODEL, budget=whole(store), mode="eager")
    state = decoder.open(4, RESERVE)
    decoder.extend(state, steps()[0])
    assert set(os.listdir(store.folder)) == before
    decoder.close()


def _slow(original: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return original(*given)

    return slow


def _mutants() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def not_written(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(KvStream, "_write", lambda self, layer: None)

    def reused_early(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(KvStream, "_slot", lambda self, layer: 0)

    def not_waited(patch: pytest.MonkeyPatch) -> None:
        original = KvStream._read

        class Waiting:
            def result(self) -> None:
                pass

            def exception(self) -> None:
                pass

        def ask(self: Any, layer: int) -> None:
            self._thread.submit(_slow(original, 0.02), self, layer)
            self._reads[layer] = Waiting()

        patch.setattr(KvStream, "_ask", ask)

    def only_first_page(patch: pytest.MonkeyPatch) -> None:
        original = kv_stream.Place.gained
        patch.setattr(kv_stream.Place, "gained", lambda self, spans: original(self, spans)[:1])

    def offset_dropped(patch: pytest.MonkeyPatch) -> None:
        original = sequences.Place
        patch.setattr(sequences, "Place", lambda *given: original(*given[:-1], 0))

    def begins_late(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(kv_stream.Place, "_first", lambda self, length: min(length, 128))

    return {
        "stale keys and values": not_written,
        "buffer reused too early": reused_early,
        "missing wait": not_waited,
        "values not written": only_first_page,
        "offset dropped": offset_dropped,
        "first page not read": begins_late,
    }


@pytest.mark.parametrize("mutant", list(_mutants()))
def test_mutants_are_caught(mutant: str, store: Store, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each changes the logits."""
    budget = whole(store)
    _mutants()[mutant](monkeypatch)
    assert not same(found(store, budget, steps())[0], expected)


@pytest.mark.parametrize("call", ["read", "write"])
def test_short_reads_and_writes_are_continued(
    call: str, store: Store, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that moves a page at a time is gone on with."""
    original = getattr(os, f"p{call}v")
    short = {call: lambda descriptor, buffers, offset: original(descriptor, [buffers[0][:4096]], offset)}
    monkeypatch.setattr(sequences, "KvFile", lambda *given: KvFile(*given, **short))
    assert same(found(store, whole(store), steps())[0], expected)


FAULTS = {
    "read": (CheckpointError, errno.EIO, r"layer 3's keys and values cannot be read back .*Input/output error"),
    "read that ends": (CheckpointError, None, r"layer 3's keys and values end early in .*, at 0 of \d+ bytes"),
    "write": (RequestError, errno.ENOSPC, r"cannot be written to .*: No space left on device; make room"),
}


@pytest.mark.parametrize("call", list(FAULTS))
def test_a_disk_that_fails_is_said_and_the_sequences_go_on(
    call: str, store: Store, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is as if it had not been asked for: once the disk works again it gives what it would have given."""
    error, number, match = FAULTS[call]
    failing = False
    count = 0
    call = call.split()[0]
    original = getattr(os, f"p{call}v")

    def fails(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal count
        count += failing
        if failing and count == (4 if call == "read" else 9):
            if number is None:
                return 0
            raise OSError(number, os.strerror(number))
        return int(original(descriptor, buffers, offset))

    monkeypatch.setattr(sequences, "KvFile", lambda *given: KvFile(*given, **{call: fails}))
    decoder = OffloadPath(store, MODEL, budget=whole(store), mode="eager")
    state = decoder.open(4, RESERVE)
    result = [decoder.extend(state, step) for step in steps()[:2]]
    failing = True
    with pytest.raises(error, match=match):
        decoder.extend(state, steps()[2])
    failing = False
    result += [decoder.extend(state, step) for step in steps()[2:]]
    decoder.close()
    assert same(result, expected)


def test_a_full_disk_is_refused_before_anything_is_computed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how much is needed."""
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(kv_file.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(TwinferError, match=r"has 1,000 bytes free; keys and values beyond .* take [\d,]+: make room"):
        found(store, whole(store), steps())


def test_every_layer_moves_once_and_pairs_take_turns() -> None:
    """For any number of layers: so many, in order, each once; of two ranks in turn where half or fewer move."""
    for layers in range(1, 9):
        for count in range(layers + 1):
            assert len(set(away_layers(layers, count))) == count
            pair = [away_layers(layers, count, rank) for rank in (0, 1)]
            for moved in pair:
                assert moved == sorted(set(moved))
                assert len(moved) == count
            if count <= layers // 2:
                assert not set(pair[0]) & set(pair[1])


def test_joined_ranges_cover_the_same_bytes() -> None:
    """And no two of them touch."""
    ranges = [slice(10, 20), slice(0, 4), slice(4, 6), slice(18, 25), slice(30, 31)]
    assert joined(ranges, 0) == [slice(0, 6), slice(10, 25), slice(30, 31)]
    assert joined(ranges, 5) == [slice(0, 31)]


cases = drawn(
    lambda pick: (
        config := draw_model_config(pick, context=40),
        draw_schedule(pick, config),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.choice([1, 2, 5]),
    )
)


def in_blocks(case: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Compare a path that attends block by block with the reference."""
    model, drawn_schedule, seed, storage, tokens = case
    source = RandomSource(model, seed)
    store = built(source, folder, storage)
    tiny_pages(patch)
    patch.setattr(OffloadPath, "_away", lambda self, plan: Away(range(len(model.layers)), tokens))
    decoder = OffloadPath(store, model, budget=1 << 30, mode="eager", direct=False)
    try:
        assert_paths_agree(Baseline.of(source, storage=storage), decoder, drawn_schedule)
    finally:
        decoder.close()


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(case=cases)
def test_attention_block_by_block_is_within_the_budget_of_errors(
    case: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For drawn configs, storages and sizes of blocks, logits are as near the truth as those of other paths must be."""
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(case, tmp_path_factory.mktemp("blocks") / "s", patch)


def _block_mutants() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def stale_block(patch: pytest.MonkeyPatch) -> None:
        original = KvBlocks._read
        patch.setattr(
            KvBlocks, "_read", lambda self, layer, span, first, slot: original(self, layer, span, 0 * first, slot)
        )

    def sums_not_scaled(patch: pytest.MonkeyPatch) -> None:
        original = kv_blocks._Sums.add

        def add(self: Any, first: int, *given: Tensor) -> None:
            original(self, first, *given)
            self._most_KTG = self._most_KTG * 0

        patch.setattr(kv_blocks._Sums, "add", add)

    def one_buffer(patch: pytest.MonkeyPatch) -> None:
        original = KvBlocks._read
        patch.setattr(KvBlocks, "_read", lambda self, layer, span, first, slot: original(self, layer, span, first, 0))
        patch.setattr(kv_blocks._Sums, "add", _slow(kv_blocks._Sums.add, 0.001))

    def positions_from_zero(patch: pytest.MonkeyPatch) -> None:
        original = kv_blocks._Sums.add
        patch.setattr(kv_blocks._Sums, "add", lambda self, first, *given: original(self, 0, *given))

    def page_not_kept(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(KvBlocks, "_write", lambda self, *given: None)

    return {
        "stale block": stale_block,
        "sums not scaled": sums_not_scaled,
        "block overwritten while attended to": one_buffer,
        "positions from zero": positions_from_zero,
        "not written": page_not_kept,
    }


@pytest.mark.parametrize("mutant", list(_block_mutants()))
def test_mutants_of_blocks_are_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks a schedule of a model with a window in one of two layers."""
    one, two = MODEL.layers[:2]
    model = replace(MODEL, layers=(one, replace(two, attention=replace(two.attention, window=6))))
    given = draw_schedule(RandomPicker(3), model)
    with monkeypatch.context() as patch:
        in_blocks((model, given, 3, Storage.FLOAT32, 2), tmp_path / "s", patch)
    _block_mutants()[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        in_blocks((model, given, 3, Storage.FLOAT32, 2), tmp_path / "mutant", monkeypatch)


def test_nothing_is_read_ahead_where_two_buffers_do_not_fit(store: Store, expected: list[Tensor]) -> None:
    """A budget a buffer smaller than what holds two is not refused, and the logits are the same."""
    given = {"batch": 4, "reserve": RESERVE, "compute": torch.float32, "expands": True}
    with pytest.raises(RequestError) as refused:
        plan(store, MODEL, budget=1000, slots=2, **given)
    two = int(str(refused.value).rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))
    result, used = found(store, two - 1, steps())
    assert used.slots == 1
    assert used.total_bytes < two
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_come_where_no_layer_fits(store: Store, expected: list[Tensor]) -> None:
    """With the smallest budget: of several blocks a sequence, and logits that differ in their last bits only."""
    budget = least(store, 600)
    made = planned(store, budget, 600)
    assert made.block_tokens > 0
    result, used = found(store, budget, steps(), 600)
    assert used.block_tokens == made.block_tokens
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one, other)
