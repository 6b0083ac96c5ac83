"""Experts that are read on demand: the logits of resident ones, to the bit; and what breaks it is seen."""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from twinfer.commands.main import main
from twinfer.compiled import moe
from twinfer.compiled.linear import multiplies_fast
from twinfer.compiled.packing import Matrix
from twinfer.loading import open_checkpoint
from twinfer.offload import expert_cache, expert_memory, path
from twinfer.offload.expert_cache import ExpertCache
from twinfer.offload.expert_slots import Slots, State
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.store import Store
from twinfer.offload.uses import Expert, Policy
from twinfer.oracle.models import RandomSource, draw_moe_config
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.errors import CheckpointError, RequestError
from twinfer.stores import build_store

from .small import BUDGET, built, logits, mixtures, offloaded, resident, same, steps_of

Patch = pytest.MonkeyPatch

cases = drawn(
    lambda pick: (
        draw_moe_config(pick, context=40),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.integer(1, 7),
        pick.choice([0, 1, 3, 100]),
        pick.choice([None, False, True]),
        pick.choice(list(Policy)),
        pick.choice([False, True]),
        pick.choice([64, 4096, 1 << 22]),
    )
)


def _keeping(patch: Patch, kept: int, *, guess: bool | None = False, policy: Policy = Policy.NEXT_USE) -> None:
    """Let caches keep so many experts, with as few slots besides as a plan may give."""
    original = ExpertCache.resize

    def resize(self: ExpertCache, *, kept: int, spare: int, dram: int = 0) -> None:
        del kept, spare
        original(self, kept=min(patched, sum(map(len, self._records))), spare=self.most + 2, dram=dram)

    patched = kept

    class Cache(ExpertCache):
        def __init__(self, file: Any, store: Store, config: ModelConfig, **given: Any) -> None:
            super().__init__(file, store, config, policy=policy, guess=guess, **given)
            self.most = expert_memory.most_at_once(config, 4)

    patch.setattr(Cache, "resize", resize)
    patch.setattr(path, "ExpertCache", Cache)


@settings(max_examples=max(12, settings.default.max_examples // 4))
@given(case=cases)
def test_logits_are_those_of_resident_experts_to_the_bit(
    case: tuple[ModelConfig, int, Storage, int, int, bool | None, Policy, bool, int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """For drawn mixtures, storages, batches, experts kept and guessed, policies and sizes of reads."""
    model, seed, storage, batch, kept, guess, policy, every, piece = case
    source = RandomSource(model, seed)
    store = built(source, tmp_path_factory.mktemp("store") / "s", storage)
    steps = steps_of(model, batch, seed)
    every = every and multiplies_fast(torch.zeros(1))
    with Patch.context() as patch:
        _keeping(patch, kept, guess=guess, policy=policy)
        patch.setattr(expert_cache, "PIECE", max(4096, piece))
        decoder = offloaded(store, model)
        found = logits(decoder, steps, every=every)
        decoder.close()
    assert same(found, logits(resident(source, storage), steps, every=every))


def _mutants() -> dict[str, Callable[[Patch], None]]:
    def wrong_record(patch: Patch) -> None:
        original = ExpertCache._read

        def read(self: ExpertCache, slot: int, expert: Expert, part: int | None) -> None:
            original(self, slot, (expert[0], (expert[1] + 1) % 6), part)

        patch.setattr(ExpertCache, "_read", read)

    def wrong_layers_record(patch: Patch) -> None:
        original = ExpertCache._read

        def read(self: ExpertCache, slot: int, expert: Expert, part: int | None) -> None:
            original(self, slot, (0, expert[1]), part)

        patch.setattr(ExpertCache, "_read", read)

    def evicted_while_read(patch: Patch) -> None:
        original = Slots.claim

        def claim(self: Slots, expert: Expert, part: int | None = None, *, guess: bool = False) -> int | None:
            for slot, state in enumerate(self._states):
                if state in (State.IN_USE, State.READY):
                    self._states[slot] = State.FREE
                    self._free.insert(0, slot)
                    break
            return original(self, expert, part, guess=guess)

        patch.setattr(Slots, "claim", claim)
        patch.setattr(Slots, "use", lambda self, slot: None)
        patch.setattr(Slots, "done", lambda self, slot: None)

    def stale_slot(patch: Patch) -> None:
        original = Slots.find
        remembered: dict[Any, int] = {}

        def find(self: Slots, expert: Expert, part: int | None = None) -> int | None:
            found = original(self, expert, part)
            if found is not None:
                remembered[expert, part] = found
            return remembered.get((expert, part))

        patch.setattr(Slots, "find", find)
        patch.setattr(Slots, "use", lambda self, slot: None)
        patch.setattr(Slots, "done", lambda self, slot: None)

    def stale_part(patch: Patch) -> None:
        def find(self: Slots, expert: Expert, part: int | None = None) -> int | None:
            return next((slot for (each, _), slot in self._places.items() if each == expert), None)

        patch.setattr(Slots, "find", find)

    def not_waited(patch: Patch) -> None:
        original = ExpertCache._work

        def work(self: ExpertCache, *given: Any) -> None:
            time.sleep(0.02)
            original(self, *given)

        patch.setattr(ExpertCache, "_work", work)
        patch.setattr(ExpertCache, "_wait", lambda self, slot: None)
        patch.setattr(Slots, "use", lambda self, slot: None)
        patch.setattr(Slots, "done", lambda self, slot: None)
        patch.setattr(Slots, "state", lambda self, slot: State.IN_USE)

    def sum_reordered(patch: Patch) -> None:
        patch.setattr(
            moe,
            "weighted",
            lambda out_TKM, weight_TK: functools.reduce(
                torch.add, reversed((out_TKM * weight_TK[:, :, None]).unbind(1))
            ),
        )

    def slots_swapped(patch: Patch) -> None:
        original = expert_cache._Layer.slots
        patch.setattr(expert_cache._Layer, "slots", lambda *given: original(*given).flip(-1))

    def another_experts_rows(patch: Patch) -> None:
        original = expert_cache._Layer.matrices

        def matrices(self: Any, experts: Any, part: int) -> Iterator[tuple[int, Matrix]]:
            for expert, (_, matrix) in zip(experts, original(self, experts, part), strict=True):
                yield expert, matrix

        patch.setattr(expert_cache._Layer, "matrices", matrices)

    def part_at_the_wrong_place(patch: Patch) -> None:
        original = ExpertCache._views
        patch.setattr(ExpertCache, "_views", lambda self, records, room: original(self, records[::-1], room)[::-1])

    return {
        "another expert's record": wrong_record,
        "another layer's record": wrong_layers_record,
        "evicted while read": evicted_while_read,
        "stale slot": stale_slot,
        "stale part": stale_part,
        "missing wait": not_waited,
        "order of the sum": sum_reordered,
        "slots swapped": slots_swapped,
        "experts out of order": another_experts_rows,
        "parts at wrong places": part_at_the_wrong_place,
    }


def _agrees(folder: Path, mutant: Callable[[Patch], None] | None) -> bool:
    """Return whether the logits are those of resident experts; a rule that breaks counts as no."""
    model = mixtures()
    source = RandomSource(model, 3)
    store, steps = built(source, folder), steps_of(model, 2, 3)
    expected = logits(resident(source), steps)
    with Patch.context() as patch:
        _keeping(patch, 5)
        if mutant is not None:
            mutant(patch)
        try:
            decoder = offloaded(store, model)
            return same(logits(decoder, steps), expected)
        except (AssertionError, KeyError, IndexError, CheckpointError):
            return False
        finally:
            decoder.close()


def test_the_case_that_mutants_are_tried_on_holds(tmp_path: Path) -> None:
    """Without a mutant it agrees, so what a mutant changes is the mutant's."""
    assert _agrees(tmp_path / "s", None)


@pytest.mark.parametrize("mutant", list(_mutants()))
def test_mutants_are_caught(mutant: str, tmp_path: Path) -> None:
    """Each changes the logits, or breaks a rule that says so."""
    assert not _agrees(tmp_path / "s", _mutants()[mutant])


def _decoder(patch: Patch, folder: Path, model: ModelConfig, kept: int, guess: bool | None = False) -> OffloadPath:
    _keeping(patch, kept, guess=guess)
    return offloaded(built(RandomSource(model, 5), folder), model)


def test_a_step_reads_no_expert_that_was_not_chosen(tmp_path: Path, monkeypatch: Patch) -> None:
    """The bytes read for steps are those of chosen experts that were not there, and no fewer than the bound."""
    model = mixtures()
    decoder = _decoder(monkeypatch, tmp_path / "s", model, 4)
    sequences = decoder.open(1, 40)
    report = decoder.experts
    assert report is not None
    for token in range(20):
        decoder.extend(sequences, [torch.tensor([token * 7 % model.vocabulary])])
    size = decoder._experts.slot_bytes  # type: ignore[union-attr]
    assert report.needed == 20 * 3 * 3
    assert report.read_bytes == (report.needed - report.found) * size
    assert 0 < report.found < report.needed
    assert report.bound_bytes() <= report.read_bytes
    assert report.prompt_bytes == 0
    decoder.close()


def test_generate_reports_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    """With --json as an object, else as a line; both count what the steps needed: 2 experts in 3 layers, 4 times."""
    checkpoint = open_checkpoint("tiny-moe")
    build_store(checkpoint, tmp_path / "s", Storage.BFLOAT16, lambda line: None)
    monkeypatch.setattr(OffloadPath, "__init__", functools.partialmethod(OffloadPath.__init__, mode="eager"))
    command = ["generate", str(tmp_path / "s"), "--memory-budget", "6MB", "--prompt", "In the", "--max-new-tokens", "5"]
    assert main([*command, "--json"]) == 0
    experts = json.loads(capsys.readouterr().out)["experts"]
    assert experts["needed"] == 4 * 3 * 2
    assert experts["hit_rate"] == experts["found"] / experts["needed"]
    assert experts["prompt_bytes"] > 0
    assert main(command) == 0
    assert f"{experts['hit_rate']:.1%} of those that steps needed were in memory" in capsys.readouterr().err


def test_a_prompt_evicts_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    """After a prompt of all experts the next token finds what it would have found without, once all slots are taken."""
    model = mixtures()

    def found(prompt: int, folder: Path) -> tuple[set[Expert], int]:
        with Patch.context() as patch:
            decoder = _decoder(patch, folder, model, 6)
            sequences = decoder.open(2, 60)
            cache, report = decoder._experts, decoder.experts
            assert cache is not None
            assert report is not None
            none = torch.tensor([], dtype=torch.int64)
            for token in range(8):
                decoder.extend(sequences, [torch.tensor([token]), none if token else torch.tensor([1])])
            if prompt:
                decoder.extend(sequences, [none, torch.arange(prompt) * 31 % model.vocabulary])
            cache._settle()
            held = {each for each, part in cache._slots._places if part is None}
            decoder.close()
            return held, report.prompt_bytes

    before, nothing = found(0, tmp_path / "a")
    after, read = found(50, tmp_path / "b")
    assert nothing == 0
    assert read > 0
    assert len(before) == 6
    assert after == before


def test_wrong_guesses_evict_nothing(tmp_path: Path, monkeypatch: Patch) -> None:
    """What is kept after each step is the same with guesses and without; with them some were right, some were not."""
    model = mixtures()
    held: list[list[set[Expert]]] = []
    for guess in (False, True):
        with Patch.context() as patch:
            decoder = _decoder(patch, tmp_path / str(guess), model, 5, guess)
            sequences, cache, report = decoder.open(1, 40), decoder._experts, decoder.experts
            assert cache is not None
            assert report is not None
            held.append([])
            for token in range(20):
                decoder.extend(sequences, [torch.tensor([token * 11])])
                whole = [(each, slot) for (each, part), slot in cache._slots._places.items() if part is None]
                held[-1].append({each for each, slot in whole if slot not in cache._slots.guessed})
            decoder.close()
    assert held[0] == held[1]
    assert 0 < report.guessed_right < report.guessed


def test_sequences_opened_later_find_another_number_of_slots(tmp_path: Path) -> None:
    """A batch, then one sequence, then a larger batch on one path: each gives the resident logits."""
    model = mixtures()
    source = RandomSource(model, 3)
    decoder, fixed = offloaded(built(source, tmp_path / "s"), model), resident(source)
    for batch in (3, 1, 6):
        steps = steps_of(model, batch, batch)
        assert same(logits(decoder, steps), logits(fixed, steps))
    decoder.close()


def test_plans_keep_experts_with_what_is_left(tmp_path: Path) -> None:
    """A larger budget keeps more, up to all, and never exceeds what it was given."""
    model = mixtures()
    store = built(RandomSource(model, 0), tmp_path / "s")
    kept = []
    for budget in (BUDGET // 25, BUDGET // 24, BUDGET // 20, BUDGET):
        decoder = offloaded(store, model, budget)
        decoder.open(1, 30)
        plan = decoder.plan
        assert plan is not None
        assert plan.total_bytes <= budget
        assert plan.experts_bytes == (plan.experts_kept + plan.experts_spare) * expert_cache.slot_bytes(store)
        kept.append(plan.experts_kept)
        decoder.close()
    assert kept == sorted(kept)
    assert kept[-1] == 18


def test_experts_are_read_while_keys_and_values_are_away(tmp_path: Path) -> None:
    """With layers' keys and values in a file, and slots for no more experts than a step needs: the same bits."""
    model = replace(mixtures(), context=1024)
    source = RandomSource(model, 3)
    store, steps = built(source, tmp_path / "s"), steps_of(model, 4, 3)
    wanted: dict[str, Any] = {"batch": 4, "reserve": 600, "compute": torch.float32, "expands": True}
    budget = next(each for each in itertools.count(200_000, 20_000) if _is_whole(store, model, each, wanted))
    results = []
    for decoder in (offloaded(store, model, budget), resident(source)):
        sequences = decoder.open(4, 600)
        results.append([decoder.extend(sequences, step) for step in steps])
        if isinstance(decoder, OffloadPath):
            assert decoder.plan is not None
            assert decoder.plan.away_layers > 0
            assert decoder.experts is not None
            assert decoder.experts.read_bytes > 0
            decoder.close()
    assert same(*results)


def _is_whole(store: Store, model: ModelConfig, budget: int, given: dict[str, Any]) -> bool:
    """Return whether a budget works with layers' keys and values brought in whole."""
    try:
        return plan(store, model, budget=budget, **given).block_tokens == 0
    except RequestError:
        return False


def test_timing_what_computing_takes_reads_no_expert(tmp_path: Path) -> None:
    """Nor do its steps count as steps of the model."""
    model = mixtures()
    decoder = offloaded(built(RandomSource(model, 3), tmp_path / "s"), model)
    sequences = decoder.open(1, 30)
    with decoder.still():
        decoder.extend(sequences, [torch.tensor([1])])
    assert decoder.experts is not None
    assert (decoder.experts.needed, decoder.experts.read_bytes, decoder.experts.prompt_bytes) == (0, 0, 0)
    decoder.extend(sequences, [torch.tensor([1])])
    assert decoder.experts.needed > 0
    decoder.close()
