"""What stays in DRAM: the rules as a state machine, and the same records whichever way they come."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from twinfer.offload import copies, dram, path, streamer
from twinfer.offload.copies import CudaLane, Staged, ThreadLane
from twinfer.offload.dram import Source, Tier, spread
from twinfer.offload.events import Kind
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.store import Store
from twinfer.oracle.models import RandomSource
from twinfer.spec.errors import CheckpointError, MachineError, RequestError

from .small import BUDGET, built, config, logits, resident, same, schedule

MODEL = config(layers=5)
SOURCE = RandomSource(MODEL, 3)
RECORDS = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return built(SOURCE, tmp_path_factory.mktemp("dram") / "s")


class TierMachine(RuleBasedStateMachine):
    """DRAM's memory holds each record's number once it was read; what is read and copied is counted beside."""

    tier_class = Tier

    def __init__(self) -> None:
        super().__init__()
        self.tier = self.tier_class()
        self.memory: dict[int, int | None] = {}
        self.filling: list[int] = []
        self.copying: list[int] = []
        self.wanted: set[int] = set()

    @rule(index=st.integers(0, RECORDS - 1))
    def fetch(self, index: int) -> None:
        """A buffer of the ring asks for a record, be it for now or ahead."""
        source = self.tier.source(index)
        if source is Source.COPY:
            assert self.memory.get(index) == index
            self.copying.append(index)
        elif source is Source.FILL:
            assert index in self.wanted
            assert index not in self.memory
            self.memory[index] = None
            self.filling.append(index)
        else:
            assert index not in self.wanted or index in self.filling

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), good=st.booleans())
    def ends(self, data: st.DataObject, good: bool) -> None:
        index = data.draw(st.sampled_from(self.filling))
        self.filling.remove(index)
        if good:
            self.memory[index] = index
            self.tier.filled(index)
            self.copying.append(index)
        else:
            del self.memory[index]
            self.tier.failed(index)

    @precondition(lambda self: self.copying)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(self.copying))
        self.copying.remove(index)
        self.tier.copied(index)

    @rule(wanted=st.sets(st.integers(0, RECORDS - 1)))
    def evict(self, wanted: set[int]) -> None:
        """Others are wanted: refused while one that has to go is being read or copied."""
        busy = {*self.filling, *self.copying} - wanted
        try:
            gone = self.tier.want(wanted)
        except AssertionError:
            assert busy
            return
        assert not busy
        self.wanted = wanted
        for index in gone:
            del self.memory[index]

    @rule()
    def reset(self) -> None:
        """All reads and copies have ended, or were dropped."""
        self.tier.reset()
        for index in self.filling:
            del self.memory[index]
        self.filling, self.copying = [], []

    @invariant()
    def what_is_there_was_read(self) -> None:
        assert self.tier.there == {index for index, held in self.memory.items() if held is not None}
        assert all(self.memory.get(index) == index for index in self.copying)


TestTier = TierMachine.TestCase


class EvictedWhileRead(Tier):
    def busy(self, index: int) -> bool:
        return False


class CopiedUnread(Tier):
    def source(self, index: int) -> Source:
        return Source.COPY if index in self._states else super().source(index)


class KeptUnwanted(Tier):
    def source(self, index: int) -> Source:
        self.wanted |= {index}
        return super().source(index)


class FailedIsThere(Tier):
    def failed(self, index: int) -> None:
        self.filled(index)


class NotReset(Tier):
    def reset(self) -> None:
        self._readers.clear()


class NeverKept(Tier):
    def source(self, index: int) -> Source:
        self._states.pop(index, None)
        return super().source(index)


@pytest.mark.parametrize("mutant", [EvictedWhileRead, CopiedUnread, KeptUnwanted, FailedIsThere, NotReset, NeverKept])
def test_mutants_of_the_tier_are_caught(mutant: type[Tier]) -> None:
    """The machine finds each broken rule."""
    machine = type("Mutated", (TierMachine,), {"tier_class": mutant})
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=settings(report_multiple_bugs=False, phases=[Phase.generate]))


def test_what_is_kept_fits_and_is_spread() -> None:
    """Within the room, all where all fit, and in any part of a step within a record of its share."""
    for sizes in ([10] * 20, [3, 50, 7, 7, 20, 20, 1, 9], [40, 1, 1, 1, 1]):
        total = sum(sizes)
        for room in range(0, total + 20, 3):
            kept = spread(sizes, room)
            assert sum(sizes[index] for index in kept) <= room
            for end in range(1, len(sizes) + 1):
                taken = sum(sizes[index] for index in kept if index < end)
                share = min(1, room / total) * sum(sizes[:end])
                assert share - 2 * max(sizes) < taken <= share + 1e-9
        assert spread(sizes, total) == tuple(range(len(sizes)))


def _decoder(store: Store, room: int) -> OffloadPath:
    return OffloadPath(store, MODEL, budget=BUDGET, dram_budget=room, mode="eager")


@pytest.mark.parametrize("lane", [False, True])
def test_what_dram_keeps_is_read_from_the_disk_once(store: Store, lane: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on only the others are read, as many bytes as are planned; all of it is copied."""
    if lane:
        monkeypatch.setattr(path, "copies_for", lambda device: Staged(ThreadLane()))
    total = sum(record.nbytes for record in store.schedule)
    for room in (0, total // 3, total):
        decoder = _decoder(store, room)
        steps = schedule(MODEL, 2, 1)
        assert same(logits(decoder, steps), logits(resident(SOURCE), steps))
        made = decoder.plan
        assert made is not None
        assert made.dram_bytes <= room
        assert decoder._dram.nbytes == made.dram_bytes
        kept = set(made.dram_records)
        assert sum(store.schedule[index].nbytes for index in kept) == made.dram_bytes == total - made.step_bytes
        for index in range(len(store.schedule)):
            reads = sum(each.kind is Kind.READ and each.record == index for each in decoder.events)
            copied = sum(each.kind is Kind.COPY and each.record == index for each in decoder.events)
            assert (reads == 1) if index in kept else (reads >= len(steps))
            assert (copied >= len(steps)) if index in kept or lane else (copied == 0)
        decoder.close()
        assert decoder._dram.nbytes == 0


def test_a_failed_read_is_not_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step reads the record again, and all is well."""
    decoder = _decoder(store, 1 << 30)
    original, fail = streamer.faulty, [True]

    def faulty(record: Any, buffer: Any) -> str | None:
        if fail and record is store.layers[2]:
            fail.clear()
            return "qkv.word"
        return original(record, buffer)

    monkeypatch.setattr(streamer, "faulty", faulty)
    steps = schedule(MODEL, 2, 1)
    with pytest.raises(CheckpointError, match=r"layer 2, qkv\.word is damaged"):
        logits(decoder, steps)
    assert same(logits(decoder, steps), logits(resident(SOURCE), steps))
    decoder.close()


def test_a_negative_dram_budget_is_refused(store: Store) -> None:
    """Before anything is allocated."""
    with pytest.raises(RequestError, match="the DRAM budget is -1 bytes; it must be 0 or more"):
        _decoder(store, -1)


def test_the_slower_of_disk_and_copies_is_what_a_fetch_takes(store: Store) -> None:
    """They go on at once."""
    given = {"budget": BUDGET, "batch": 1, "reserve": 20, "compute": torch.float32, "expands": True}
    made = plan(store, MODEL, **given, dram_budget=store.nbytes // 2)
    assert made.fetch_s(made.step_bytes / 2.0, made.copied_bytes / 1.0) == 2.0
    assert made.fetch_s(made.step_bytes / 2.0, made.copied_bytes / 3.0) == 3.0


def _agrees(store: Store, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(path, "copies_for", lambda device: Staged(ThreadLane(0.005)))
    decoder = _decoder(store, store.nbytes // 2)
    steps = schedule(MODEL, 2, 3)
    try:
        return same(logits(decoder, steps), logits(resident(SOURCE), steps))
    finally:
        decoder.close()


def _mutants() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def wrong_layer(patch: pytest.MonkeyPatch) -> None:
        original = dram.Dram.buffer
        patch.setattr(dram.Dram, "buffer", lambda self, index, nbytes: original(self, 1, 1 << 20)[:nbytes])
        patch.setattr(streamer._Reading, "_verify", lambda self, piece: True)

    def unread(patch: pytest.MonkeyPatch) -> None:
        original = streamer._Reading._read

        def read(self: Any, piece: Any) -> Exception | None:
            return None if self.sources[piece.ticket] is Source.FILL else original(self, piece)

        patch.setattr(streamer._Reading, "_read", read)
        patch.setattr(streamer._Reading, "_verify", lambda self, piece: True)

    def another_slot(patch: pytest.MonkeyPatch) -> None:
        original = copies.Staged.copy
        first: list[Any] = []

        def copy(self: Any, slot: int, target: Any, source: Any) -> None:
            first.append(target)
            original(self, slot, first[0], source)

        patch.setattr(copies.Staged, "copy", copy)

    return {
        "copy of the wrong layer": wrong_layer,
        "kept before it was read": unread,
        "copy not waited for": lambda patch: patch.setattr(copies.Staged, "arrive", lambda self, slot: None),
        "copied into another slot": another_slot,
    }


def test_the_case_that_mutants_are_tried_on_holds(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mutant it agrees, so what a mutant changes is the mutant's."""
    assert _agrees(store, monkeypatch)


@pytest.mark.parametrize("mutant", list(_mutants()))
def test_mutants_are_caught(mutant: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each changes the logits."""
    _mutants()[mutant](monkeypatch)
    assert not _agrees(store, monkeypatch)


class FakeCuda:
    """Stands for torch.cuda: copies are done at once, and what waits for what is written down."""

    def __init__(self, patch: pytest.MonkeyPatch, *, registers: int = 0) -> None:
        self.log: list[tuple[str, FakeEvent]] = []
        self.pinned: set[int] = set()
        self.registers = registers
        self.computation, self.lane = FakeStream(self, "computation"), FakeStream(self, "lane")
        patch.setattr(torch.cuda, "Stream", lambda device: self.lane)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.computation)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "cudart", lambda: self)
        patch.setattr(path, "copies_for", lambda device: Staged(CudaLane(device)))

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned.add(address)
        return self.registers

    def cudaHostUnregister(self, address: int) -> None:
        self.pinned.remove(address)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def synchronize(self) -> None:
        self._cuda.log.append(("host waits", self))


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self._name = cuda, name

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self._cuda)
        self._cuda.log.append((f"{self._name} marks", event))
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self._cuda.log.append((f"{self._name} waits", event))


def test_streams_wait_for_each_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use waits for a copy of its own, and each copy for a use of its slot, or the first for the buffers' making.

    A fake stands for CUDA. No host memory stays pinned.
    """
    cuda = FakeCuda(monkeypatch)
    decoder = _decoder(store, store.nbytes // 2)
    steps = schedule(MODEL, 2, 3)
    assert same(logits(decoder, steps), logits(resident(SOURCE), steps))
    made = decoder.plan
    assert made is not None
    assert len(cuda.pinned) == made.slots + len(made.dram_records)
    decoder.close()
    assert cuda.pinned == set()
    named: dict[str, list[FakeEvent]] = {}
    for what, event in cuda.log:
        if what.endswith("waits"):
            assert event in named["computation marks" if what == "lane waits" else "lane marks"]
        named.setdefault(what, []).append(event)
    waited, copied, after = (named[what] for what in ("computation waits", "lane marks", "lane waits"))
    assert len(waited) == len(set(waited)) == len(store.schedule) * len(steps)
    assert len(after) == len(copied) == len(set(after)) + made.slots - 1


@pytest.mark.parametrize("kept", [False, True])
def test_the_host_waits_for_what_is_copied_from(kept: bool, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's host buffer is read into, and a record in DRAM may be evicted, once it was copied: all but the last."""
    cuda = FakeCuda(monkeypatch)
    decoder = _decoder(store, store.nbytes if kept else 0)
    logits(decoder, schedule(MODEL, 2, 3))
    log, made = list(cuda.log), decoder.plan  # closing waits for the rest
    decoder.close()
    assert made is not None
    copied = {event for what, event in log if what == "lane marks"}
    waited = {event for what, event in log if what == "host waits"}
    assert len(copied) > 2 * len(store.schedule)
    assert len(copied - waited) <= made.slots


def test_memory_that_cannot_be_pinned_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what CUDA says, and what to do."""
    FakeCuda(monkeypatch, registers=2)
    with pytest.raises(MachineError, match=r"cannot be pinned for cpu \(CUDA error 2\); give a smaller DRAM budget"):
        logits(_decoder(store, 1 << 20), schedule(MODEL, 1, 0))
