"""Any order of capture, replay, eviction, growth, closing and opening: each step is the plain call, to the bit.

The machine keeps a model of which graphs should live, and holds on to every result that it was ever handed.
"""

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)
from torch import Tensor

from twinfer.compiled import graph
from twinfer.compiled.graph import DecodeGraphs, Step, bucket
from twinfer.compiled.layers import Cache
from twinfer.compiled.sequences import StaticSequences
from twinfer.compiled.steps import decode_program, eager
from twinfer.compiled.weights import prepare
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.spec.config import Storage

from .stand_in import CaptureError, StandIn

CPU = torch.device("cpu")
CONTEXT = 20
MOST = 2
"""Graphs kept."""


all_rows = st.lists(st.booleans(), min_size=3, max_size=3)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.contiguous().view(torch.int32), right.contiguous().view(torch.int32))


def cloned(caches: tuple[Cache, ...]) -> tuple[Cache, ...]:
    return tuple(Cache(*(each.clone() for each in cache)) for cache in caches)


def same_caches(left: tuple[Cache, ...], right: tuple[Cache, ...]) -> bool:
    return all(same_bits(*pair) for caches in zip(left, right, strict=True) for pair in zip(*caches, strict=True))


@dataclass(eq=False)
class Group:
    """Sequences, and how often they have grown: a graph serves one group as long as it does not grow."""

    sequences: StaticSequences
    grown: int = 0


class GraphMachine(RuleBasedStateMachine):
    """Drives `graphs_of(model, device, MOST)`."""

    graphs_of: type[DecodeGraphs] = DecodeGraphs
    groups = Bundle("groups")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(graph, "_LEAST_SLOTS", 2)

    def teardown(self) -> None:
        self.patch.undo()

    @initialize(target=groups, seed=st.integers(0, 2**20))
    def load(self, seed: int) -> Any:
        config = draw_model_config(RandomPicker(seed), context=CONTEXT)
        self.config = config = replace(config, layers=config.layers[:2])
        self.model = prepare(RandomSource(config, seed), Storage.FLOAT32, CPU)
        self.program = decode_program(config, Storage.FLOAT32, eager)
        self.device = StandIn()
        self.graphs = self.graphs_of(self.model, self.device, MOST)
        self.slots = torch.arange(CONTEXT)
        self.held: list[tuple[Tensor, Tensor]] = []
        """What was handed out, and what it said then."""
        self.kept: list[tuple[Group, int, int, int]] = []
        """Which graphs should live, least recently used first: group, growths, rows, slots."""
        self.opened: list[Group] = []
        return multiple(self.opened_with([3, 0]), self.opened_with([9, 2, 5]), self.opened_with([4]))

    @precondition(lambda self: len(self.opened) < 5)
    @rule(target=groups, lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), more=st.integers(1, 8))
    def open(self, lengths: list[int], more: int) -> Group:
        return self.opened_with(lengths, more)

    def opened_with(self, lengths: list[int], more: int = 2) -> Group:
        """Sequences of such lengths, with room for more; their caches hold noise, as prefill might have left it."""
        sequences = StaticSequences(self.config, len(lengths), max(lengths) + more, CPU)
        sequences.advance(lengths, sequences.last_BV)
        for seed, each in enumerate(each for cache in sequences.caches for each in cache):
            each.normal_(generator=torch.Generator().manual_seed(1000 * len(self.opened) + seed))
        self.opened.append(Group(sequences))
        return self.opened[-1]

    @rule(group=groups, chosen=all_rows, token=st.integers(0, 2**20))
    def step(self, group: Group, chosen: list[bool], token: int) -> None:
        """Some of the sequences gain a token; if they are full, they grow."""
        rows = self._rows(group, chosen)
        if not rows:
            return
        self._make_room(group, max(group.sequences.lengths[row] for row in rows) + 1)
        step, slot_S = self._arguments(group, rows, token)
        after = cloned(group.sequences.caches)
        with torch.no_grad():
            plain_RV = self.program(self.model, after, torch.tensor(step), slot_S)
            captures = self._captures_expected(group, rows, len(slot_S))
            before = len(self.device.graphs)
            logits_RV = self.graphs.step(self.program, group.sequences.caches, step, slot_S)
        assert same_bits(logits_RV, plain_RV), "the logits differ from the plain call's"
        assert same_caches(group.sequences.caches, after), "the caches differ from the plain call's"
        assert len(self.device.graphs) - before == captures, "a capture too many or too few"
        assert len(self._living()) == len(self.kept), "a graph too many or too few is alive"
        self.held.append((logits_RV, logits_RV.clone()))
        gained = [int(row in rows) for row in range(len(group.sequences.lengths))]
        group.sequences.advance(gained, group.sequences.last_BV)

    @rule(group=groups, chosen=all_rows, fail_at=st.one_of(st.none(), st.integers(0, 60)))
    def fail(self, group: Group, chosen: list[bool], fail_at: int | None) -> None:
        """Capture breaks off at an operator, or succeeds and the first replay fails: nothing has changed."""
        rows = [row for row in self._rows(group, chosen) if group.sequences.lengths[row] < group.sequences.capacity]
        if not rows:
            return
        step, slot_S = self._arguments(group, rows, 1)
        before = cloned(group.sequences.caches)
        captures = self._captures_expected(group, rows, len(slot_S))
        if captures and fail_at is not None:
            self.device.fail_at = fail_at
            self.kept.pop()
        else:
            self.device.fail_next_replay = True
        try:
            with torch.no_grad():
                self.graphs.step(self.program, group.sequences.caches, step, slot_S)
        except CaptureError as error:
            if "on purpose" not in str(error):
                raise
        else:
            raise AssertionError("a capture too many or too few: none failed")
        assert same_caches(group.sequences.caches, before), "the caller's caches are not as they were"

    @rule(group=groups, more=st.integers(1, 6))
    def grow(self, group: Group, more: int) -> None:
        self._make_room(group, min(CONTEXT, group.sequences.capacity + more))

    @rule(group=consumes(groups))
    def close(self, group: Group) -> None:
        """And nobody keeps the memory."""
        caches = [weakref.ref(each) for cache in group.sequences.caches for each in cache]
        group.sequences.close()
        self.opened.remove(group)
        if any(each() is not None for each in caches):
            gc.collect()  # of the frames of a failure, perhaps
        assert all(each() is None for each in caches), "closed sequences keep their memory"

    @invariant()
    def what_was_handed_out_has_not_changed(self) -> None:
        for now, then in getattr(self, "held", []):
            assert same_bits(now, then), "an earlier result has changed"

    @invariant()
    def graphs_share_one_pool(self) -> None:
        assert len({id(each.pool) for each in self._living()}) <= 1, "graphs have several pools"

    def _living(self) -> list[Any]:
        return [each for each in self.device.graphs if not each.was_reset] if hasattr(self, "device") else []

    def _rows(self, group: Group, chosen: list[bool]) -> list[int]:
        """The chosen sequences that the context has room for."""
        return [row for row, length in enumerate(group.sequences.lengths) if chosen[row] and length < CONTEXT]

    def _make_room(self, group: Group, longest: int) -> None:
        group.grown += longest > group.sequences.capacity
        group.sequences.make_room(longest)

    def _arguments(self, group: Group, rows: list[int], token: int) -> tuple[Step, Tensor]:
        lengths, capacity = group.sequences.lengths, group.sequences.capacity
        tokens = [(token + 7 * row) % self.config.vocabulary for row in rows]
        step = tokens, [lengths[row] for row in rows], [row * capacity for row in rows]
        return step, self.slots[: bucket(max(lengths[row] for row in rows) + 1, capacity)]

    def _captures_expected(self, group: Group, rows: list[int], slots: int) -> int:
        """How many captures the next step should make; its graph becomes the last used, and the oldest may go."""
        key = group, group.grown, len(rows), slots
        known = key in self.kept
        if known:
            self.kept.remove(key)
        else:
            kept = [each for each in self.kept if each[0] in self.opened and each[1] == each[0].grown]
            self.kept = kept[max(0, len(kept) - MOST + 1) :]
        self.kept.append(key)
        return 0 if known else 1
