"""The whole path on a device with a memory of its own: what it gives is what the resident path gives, to the bit."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from twinfer.offload import calls, cutting, passes, path, sequences
from twinfer.offload.copies import Inline
from twinfer.offload.expert_cache import ExpertCache
from twinfer.offload.expert_dram import ExpertDram
from twinfer.offload.kv_file import KvFile
from twinfer.offload.kv_stream import KvStream
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.sequences import Away
from twinfer.offload.store import Store
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource, draw_model_config, draw_moe_config
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.errors import RequestError

from .small import BUDGET, built, config, logits, mixtures, resident, same, schedule, steps_of, tiny_pages
from .stand_in import COMPONENTS, Apart, on_stand_in

cases = drawn(
    lambda pick: (
        draw_model_config(pick, context=40),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.integer(1, 7),
        pick.choice([1, 2, 3, 4]),
        pick.choice([2, 512]),
        pick.choice([1, cutting.LEAST]),
        pick.choice([0, pick.integer(0, 1 << 18), 1 << 30]),
        pick.choice([0, 2**16 - 1, pick.integer(0, 2**16 - 1)]),
        pick.choice([0, 2**16 - 1, pick.integer(0, 2**16 - 1)]),
        pick.choice([False, True]),
    )
)


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(case=cases)
def test_logits_are_those_of_the_resident_path(
    case: tuple[ModelConfig, int, Storage, int, int, int, int, int, int, int, bool],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """For drawn configs, storages, batches and buffers, and layers that are one record or several.

    Any of the records stay in DRAM; the keys and values of any layers are away, those of any of them in DRAM. The same
    on a device without a memory of its own.
    """
    model, seed, storage, batch, slots, flight, least, room, away, in_dram, apart = case
    source = RandomSource(model, seed)
    steps = schedule(model, batch, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "LEAST", least)
        store = built(source, tmp_path_factory.mktemp("store") / "s", storage)
        patch.setattr(path, "Streamer", lambda *given: Streamer(*given[:2], slots, *given[3:]))
        patch.setattr(passes, "call_bytes", lambda *given: BUDGET // flight)
        moved = [index for index in range(len(model.layers)) if away >> index & 1]
        dram = [index for index in moved if in_dram >> index & 1]
        patch.setattr(path.OffloadPath, "_away", lambda self, plan: Away(moved, 0, dram))
        if apart:
            on_stand_in(patch)
        decoder = OffloadPath(store, model, budget=BUDGET, dram_budget=room, mode="eager")
        found = logits(decoder, steps)
        decoder.close()
    assert same(found, logits(resident(source, storage), steps))


def _few_experts(patch: pytest.MonkeyPatch, kept: int, in_dram: int) -> None:
    """Keep so many experts on the device and in DRAM."""
    original = ExpertCache.resize

    def resize(self: ExpertCache, *, kept: int, spare: int, dram: int) -> None:
        del kept, dram
        experts = sum(map(len, self._records))
        original(self, kept=min(few, experts), spare=spare, dram=min(in_dram, experts))

    few = kept
    patch.setattr(ExpertCache, "resize", resize)


mixture_cases = drawn(
    lambda pick: (
        draw_moe_config(pick, context=40),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.integer(1, 6),
        pick.choice([0, 1, 3]),
        pick.choice([0, 1, 2, 5, 100]),
        pick.choice([False, True]),
    )
)


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(case=mixture_cases)
def test_experts_are_those_of_the_resident_path(
    case: tuple[ModelConfig, int, Storage, int, int, int, bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For drawn mixtures, storages and batches, with any number of experts kept on the device and in DRAM.

    The same on a device without a memory of its own.
    """
    model, seed, storage, batch, kept, in_dram, apart = case
    source = RandomSource(model, seed)
    store = built(source, tmp_path_factory.mktemp("store") / "s", storage)
    steps = steps_of(model, batch, seed)
    with pytest.MonkeyPatch.context() as patch:
        _few_experts(patch, kept, in_dram)
        if apart:
            on_stand_in(patch)
        decoder = OffloadPath(store, model, budget=BUDGET, mode="eager")
        found = logits(decoder, steps)
        decoder.close()
    assert same(found, logits(resident(source, storage), steps))


MIXTURE = mixtures()
EVERYTHING = RandomSource(MIXTURE, 5)


def _agrees(folder: Path, patch: pytest.MonkeyPatch, **kinds: type[Apart]) -> bool:
    """Run a model whose records, experts, keys and values all come and go, some of each by way of DRAM."""
    store = built(EVERYTHING, folder)
    steps = steps_of(MIXTURE, 2, 3)
    _few_experts(patch, 1, 4)
    patch.setattr(path.OffloadPath, "_away", lambda self, plan: Away(range(4), 0, (1, 2)))
    patch.setattr(path, "Streamer", lambda *given: Streamer(*given[:2], 2, *given[3:]))
    on_stand_in(patch, 0.002, **kinds)
    decoder = OffloadPath(store, MIXTURE, budget=BUDGET, dram_budget=store.nbytes // 3, mode="eager")
    try:
        return same(logits(decoder, steps), logits(resident(EVERYTHING), steps))
    finally:
        decoder.close()


class NoArrive(Apart):
    def arrive(self, slot: int) -> None:
        self._counted.uses += 1
        self._used[slot] = self._counted.uses


class NoLeave(Apart):
    def leave(self, slot: int) -> None:
        pass


class NoSettle(Apart):
    def settle(self, slot: int) -> None:
        pass


class WrongSlot(Apart):
    def copy(self, slot: int, target: Any, source: memoryview) -> None:
        seen = self.__dict__.setdefault("seen", [])
        others = [each for each in seen if len(each) >= len(source) and each.data_ptr() != target.data_ptr()]
        seen.append(target)
        super().copy(slot, others[0] if others else target, source)


class SavedUnmarked(Apart):
    def save(self, slot: int, pairs: Any, after: Any) -> None:
        self._past = -1
        super().save(slot, pairs, None)


def test_the_case_that_mutants_are_tried_on_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mutant it agrees, so what a mutant changes is the mutant's."""
    assert _agrees(tmp_path / "s", monkeypatch)


# Of keys and values a mark of `save` stands between the computation and the next copy into a buffer.
MUTANTS = [
    (component, mutant)
    for component in COMPONENTS
    for mutant in (NoArrive, NoLeave, NoSettle, WrongSlot)
    if (component, mutant) != ("keys and values", NoLeave)
]


@pytest.mark.parametrize(("component", "mutant"), MUTANTS)
def test_mutants_of_the_waits_are_caught(
    component: str, mutant: type[Apart], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each changes the logits, of whichever component's copies it is."""
    assert not _agrees(tmp_path / "s", monkeypatch, **{component: mutant})


def _copied_back_early(patch: pytest.MonkeyPatch) -> None:
    original = KvStream.layer

    @contextmanager
    def layer(self: KvStream, layer: int) -> Iterator[Any]:
        with original(self, layer) as cache:
            before = [each.clone() for each in cache]
            yield cache
            for mine, old in zip(cache, before, strict=True):
                mine.copy_(old)

    patch.setattr(KvStream, "layer", layer)


def test_keys_and_values_that_are_copied_back_too_early_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of before the layer was computed change the logits, and so do those that wait for no mark of it."""
    with monkeypatch.context() as patch:
        _copied_back_early(patch)
        assert not _agrees(tmp_path / "a", patch)
    with monkeypatch.context() as patch:
        assert not _agrees(tmp_path / "b", patch, **{"keys and values": SavedUnmarked})


def _goes_on(folder: Path, patch: pytest.MonkeyPatch, **kinds: type[Apart]) -> bool:
    """Run a model whose keys and values are away, and ask again for the step whose third layer fails."""
    model = config(layers=4)
    source, steps = RandomSource(model, 2), schedule(model, 2, 3)
    store = built(source, folder)
    patch.setattr(path.OffloadPath, "_away", lambda self, plan: Away(range(4), 0, (1, 2)))
    on_stand_in(patch, 0.002, **kinds)
    original, failing = calls.Call.layer, 2 * 4 + 3
    count = itertools.count(1)

    def layer(self: calls.Call, *given: Any) -> None:
        if next(count) == failing:
            raise OSError("stop")
        original(self, *given)

    patch.setattr(calls.Call, "layer", layer)
    decoder = OffloadPath(store, model, budget=BUDGET, mode="eager")
    state, found = decoder.open(2, 30), []
    found.append(decoder.extend(state, steps[0]))
    with pytest.raises(OSError, match="stop"):
        decoder.extend(state, steps[1])
    found += [decoder.extend(state, step) for step in steps[1:]]
    decoder.close()
    return same(found, logits(resident(source), steps))


def test_after_a_step_that_failed_the_next_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed when it failed may still be read; without that wait the logits change."""
    with monkeypatch.context() as patch:
        assert _goes_on(tmp_path / "a", patch)
    with monkeypatch.context() as patch:
        assert not _goes_on(tmp_path / "b", patch, **{"keys and values": NoLeave})


def _in_blocks(folder: Path, patch: pytest.MonkeyPatch, copies: type[Apart] | None) -> list[Tensor]:
    """Return the logits of a model that attends block by block, one of its layers in DRAM."""
    model = config(layers=3)
    store = built(RandomSource(model, 6), folder)
    tiny_pages(patch)
    patch.setattr(path.OffloadPath, "_away", lambda self, plan: Away(range(3), 2, (1,)))
    if copies is not None:
        on_stand_in(patch, 0.002, **{"keys and values": copies})
    decoder = OffloadPath(store, model, budget=BUDGET, mode="eager", direct=False)
    found = logits(decoder, schedule(model, 2, 3))
    decoder.close()
    return found


def test_attention_in_blocks_is_the_cpus(tmp_path: Path) -> None:
    """To the bit; and each fault of the waits changes it."""

    def found(copies: type[Apart] | None) -> list[Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            return _in_blocks(tmp_path / (copies.__name__ if copies else "cpu"), patch, copies)

    expected = found(None)
    assert same(found(Apart), expected)
    for mutant in (NoArrive, NoLeave, NoSettle, WrongSlot, SavedUnmarked):
        assert not same(found(mutant), expected), mutant


@pytest.mark.parametrize("apart", [False, True])
def test_experts_in_dram_are_read_once(apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts and steps that come again ask the disk for none, though the device keeps none."""
    store = built(EVERYTHING, tmp_path / "s")
    steps = steps_of(MIXTURE, 2, 3)
    _few_experts(monkeypatch, 0, 100)
    monkeypatch.setattr(ExpertCache, "_expected", lambda self, place, x_M: None)
    if apart:
        on_stand_in(monkeypatch)
    decoder = OffloadPath(store, MIXTURE, budget=BUDGET, mode="eager")
    read = []
    for _ in range(2):
        logits(decoder, steps)
        report = decoder.experts
        assert report is not None
        read.append(report.read_bytes + report.prompt_bytes)
    decoder.close()
    assert read[0] > 0
    assert read[1] == 0


@pytest.mark.parametrize("apart", [False, True])
def test_dram_takes_keys_and_values_first(apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many layers' as it has room for, before records; a file is made for the others only."""
    model, reserve, files = replace(config(layers=4), context=600), 512, []
    source = RandomSource(model, 2)
    store = built(source, tmp_path / "s")
    given: dict[str, Any] = {"batch": 4, "reserve": reserve, "compute": torch.float32, "expands": True}
    budget = next(size for size in range(1 << 20, 1 << 30, 64 << 10) if _moves_all(store, model, size, given))
    one = plan(store, model, budget=budget, **given).away_bytes // 4

    def file(folder: Path, nbytes: int) -> KvFile:
        files.append(nbytes)
        return KvFile(folder, nbytes)

    monkeypatch.setattr(sequences, "KvFile", file)
    if apart:
        on_stand_in(monkeypatch)
    steps = schedule(model, 4, 3)
    expected = logits(resident(source), steps)
    for layers in (0, 2, 4):
        decoder = OffloadPath(store, model, budget=budget, dram_budget=layers * one, mode="eager")
        state = decoder.open(4, reserve)
        assert same([decoder.extend(state, step) for step in steps], expected)
        made = decoder.plan
        assert made is not None
        assert (len(made.dram_caches), made.dram_bytes) == (layers, layers * one)
        assert (made.staging_bytes > 0) == apart
        decoder.close()
    assert files == [4 * one, 2 * one]


def _moves_all(store: Store, model: ModelConfig, budget: int, given: dict[str, Any]) -> bool:
    """Return whether all layers' keys and values are away within a budget, whole."""
    with suppress(RequestError):
        made = plan(store, model, budget=budget, **given)
        return made.away_layers == len(model.layers) and made.block_tokens == 0
    return False


def _dram_of(experts: int, room: int) -> ExpertDram:
    dram = ExpertDram(Inline(), 4096)
    dram.resize(room)
    for expert in range(experts):
        assert dram.claim((0, expert), evict=False) is not None
        dram.filled((0, expert))
        dram.done((0, expert))
    return dram


def test_dram_gives_up_the_expert_that_was_used_longest_ago() -> None:
    """And none that is read or copied, nor any for what must not evict."""
    dram = _dram_of(3, 3)
    assert dram.find((0, 0)) is not None
    dram.done((0, 0))
    assert dram.find((0, 1)) is not None
    assert dram.claim((0, 5), evict=False) is None
    assert dram.claim((0, 6), evict=True) is not None
    assert [dram.find((0, expert)) is not None for expert in range(3)] == [True, True, False]
    assert dram.claim((0, 6), evict=True) is None
    assert dram.claim((0, 7), evict=True) is None
    dram.failed((0, 6))
    assert dram.find((0, 6)) is None
    assert dram.claim((0, 7), evict=False) is not None
