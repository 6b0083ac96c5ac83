"""Captured decode steps are the plain steps to the bit, and the machine that says so would notice if they were not."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from twinfer.compiled import graph
from twinfer.compiled.graph import DecodeGraphs, bucket
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.sequences import StaticSequences
from twinfer.compiled.steps import decode_program, eager
from twinfer.compiled.weights import prepare
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import Storage

from .graph_machine import CPU, GraphMachine, cloned, same_bits, same_caches
from .stand_in import CaptureError, CountedTapes, StandIn

TestGraphs = GraphMachine.TestCase
TestGraphs.settings = settings(max_examples=15, stateful_step_count=15)


class Unrestored(DecodeGraphs):
    """What warm-up wrote stays."""

    def _put_back(self, *_: Any) -> None:
        pass


class NotCopiedOut(DecodeGraphs):
    """Hands out the graph's own memory."""

    def _handed_out(self, logits_RV: Tensor) -> Tensor:
        return logits_RV


class EvictionFreesThePool(DecodeGraphs):
    """One goes, and all that share its memory are undone."""

    def _make_room(self) -> None:
        before = len(self._graphs)
        super()._make_room()
        if len(self._graphs) < before:
            for each in self._graphs.values():
                each.captured.reset()


class APoolEach(DecodeGraphs):
    def _make_room(self) -> None:
        super()._make_room()
        self._pool = self._device.pool()


class NoEviction(DecodeGraphs):
    def _make_room(self) -> None:
        self._most = len(self._graphs) + 1
        super()._make_room()


class FirstInFirstOut(DecodeGraphs):
    """Being used does not save a graph."""

    def step(self, *arguments: Any) -> Tensor:
        order = list(self._graphs)
        logits_RV = super().step(*arguments)
        order = [key for key in order if key in self._graphs]
        self._graphs = {key: self._graphs[key] for key in [*order, *self._graphs]}
        return logits_RV


class NoSlotsInTheKey(DecodeGraphs):
    def _key(self, caches: Any, rows: int, slots: int) -> Any:
        return super()._key(caches, rows, 0)


class NoRowsInTheKey(DecodeGraphs):
    def _key(self, caches: Any, rows: int, slots: int) -> Any:
        return super()._key(caches, 0, slots)


class NoCachesInTheKey(DecodeGraphs):
    def _key(self, caches: Any, rows: int, slots: int) -> Any:
        return rows, slots


class CachesKeptAlive(DecodeGraphs):
    def _key(self, caches: Any, rows: int, slots: int) -> Any:
        self.kept_alive = [*getattr(self, "kept_alive", []), caches]
        return super()._key(caches, rows, slots)


class DeathUnnoticed(DecodeGraphs):
    """A graph whose caches are gone is taken for good, should others come to have their ids."""

    def _is_gone(self, graph: Any) -> bool:
        return False


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (Unrestored, "the caller's caches are not as they were"),
        (NotCopiedOut, "an earlier result has changed"),
        (EvictionFreesThePool, "a graph that was reset|the pool is gone"),
        (APoolEach, "several pools"),
        (NoEviction, "too many or too few"),
        (NoSlotsInTheKey, "the logits differ|too many or too few"),
        (NoRowsInTheKey, "doesn't match the broadcast shape|must match the size|too many or too few"),
        (NoCachesInTheKey, "the logits differ|memory that is gone|out of bounds|too many or too few"),
        (CachesKeptAlive, "keep their memory|too many or too few is alive"),
        (DeathUnnoticed, "memory that is gone|too many or too few is alive"),
    ],
)
def test_the_machine_catches(fault: type[DecodeGraphs], complaint: str) -> None:
    machine = type("Faulty", (GraphMachine,), {"graphs_of": fault})
    with pytest.raises((AssertionError, CaptureError, RuntimeError, IndexError), match=complaint):
        run_state_machine_as_test(
            machine,
            settings=settings(max_examples=300, stateful_step_count=20, phases=[Phase.generate], database=None),
        )


def take_turns(kind: type[DecodeGraphs]) -> None:
    """Two graphs are kept: a, b, a, c, a captures three times and not again for a. Chance finds this too seldom."""
    machine = type("Turns", (GraphMachine,), {"graphs_of": kind})()
    try:
        machine.load(0)
        groups = {name: machine.opened_with([8], more=7) for name in "abc"}
        for name in "abaca":
            machine.step(groups[name], [True, False, False], 0)
    finally:
        machine.teardown()


def test_the_least_recently_used_graph_goes() -> None:
    take_turns(DecodeGraphs)
    with pytest.raises(AssertionError, match="a capture too many"):
        take_turns(FirstInFirstOut)


@pytest.mark.parametrize("device_of", [StandIn, CountedTapes])
@given(
    seed=st.integers(0, 2**20),
    storage=st.sampled_from(Storage),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    slots=st.integers(8, 12),
)
@settings(max_examples=15)
@torch.no_grad()
def test_a_captured_step_is_the_plain_step(
    device_of: type[StandIn] | type[CountedTapes], seed: int, storage: Storage, lengths: list[int], slots: int
) -> None:
    """Of any model in any storage: at capture, and at a later replay on other tokens and positions."""
    config = draw_model_config(RandomPicker(seed), context=16)
    model = prepare(RandomSource(config, seed), storage, CPU)
    program = decode_program(config, storage, eager)
    sequences = StaticSequences(config, len(lengths), 12, CPU)
    device = device_of()
    graphs = DecodeGraphs(model, device)
    start_R, slot_S = 12 * torch.arange(len(lengths)), torch.arange(slots)
    for position_R in (torch.tensor(lengths), 7 - torch.tensor(lengths)):
        step_3R = torch.stack([(position_R + seed) % config.vocabulary, position_R, start_R])
        plain = cloned(sequences.caches)
        plain_RV = program(model, plain, step_3R, slot_S)
        assert same_bits(graphs.step(program, sequences.caches, step_3R.tolist(), slot_S), plain_RV)
        assert same_caches(sequences.caches, plain)
    assert len(device.graphs) == 1


cases = drawn(
    lambda pick: (
        config := draw_model_config(pick, context=40),
        draw_schedule(pick, config),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
    )
)


@given(case=cases)
@settings(max_examples=6)
def test_a_path_that_decodes_by_graphs_gives_what_the_reference_gives(case: tuple[Any, ...]) -> None:
    """Within the budget, for a bucket's sums run over more slots than they need."""
    config, schedule, seed, storage = case
    source = RandomSource(config, seed)
    path = CompiledPath(source, storage=storage, mode="eager")
    device = StandIn()
    path._graphs = DecodeGraphs(path.model, device, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_LEAST_SLOTS", 4)
        assert_paths_agree(Baseline.of(source, storage=storage), path, schedule)


def test_a_path_captures_once_for_each_bucket() -> None:
    """128 slots from position 2 to 127, then 140, which is the capacity."""
    config = draw_model_config(RandomPicker(4), context=140)
    path = CompiledPath(RandomSource(config, 4), mode="eager")
    device = StandIn()
    path._graphs = DecodeGraphs(path.model, device)
    sequences = path.open(1, 140)
    captures = []
    for tokens in (2, 1, 1, 120, 1, 1, 4, 1, 1):
        path.extend(sequences, [torch.zeros(tokens, dtype=torch.int64)])
        captures.append(len(device.graphs))
    assert captures == [0, 1, 1, 1, 1, 1, 1, 2, 2]


@given(longest=st.integers(1, 10_000), room=st.integers(0, 10_000))
def test_a_bucket_holds_its_sequences_and_wastes_less_than_half(longest: int, room: int) -> None:
    slots = bucket(longest, longest + room)
    assert longest <= slots <= min(longest + room, max(128, 2 * longest - 1))


@pytest.mark.parametrize(
    ("mode", "captured", "expected"),
    [("compiled", True, True), ("guarded", True, True), ("compiled", False, False), ("eager", True, False)],
)
def test_steps_are_captured_where_they_are_compiled_and_unless_the_caller_says_no(
    mode: str, captured: bool, expected: bool
) -> None:
    config = draw_model_config(RandomPicker(4), context=140)
    path = CompiledPath(RandomSource(config, 4), mode=mode, captured=captured)
    assert (path._graphs is not None) == expected
