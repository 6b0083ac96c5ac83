"""Experts on demand: a layer's chosen experts are read from the disk when its router has chosen them.

A token needs k of a layer's E experts, so reading all of them would read E / k times what is used. Which they are is
known only in the middle of the layer; there the computation stops (`compiled.fetching`) until they are in memory. What
was read stays for the next tokens as far as the budget goes (`expert_slots`, `uses`). A prompt reads each expert that
any of its tokens chose, a part at a time, past what is kept: free slots are filled on the way, but nothing goes.

Slots are views of one span with room for all experts, of which memory is taken for those slots only that the plan
allows (`expert_memory`); so a compiled layer is the same within any budget. What DRAM keeps besides is copied from
there (`expert_dram`).

Shapes: T tokens, K = top_k, M hidden.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..compiled.experts import one_expert
from ..compiled.fetching import register
from ..compiled.linear import PASS_ROWS
from ..compiled.moe import Mlp, Moe
from ..compiled.packing import Matrix
from ..compiled.weights import Layer
from ..spec.config import ModelConfig
from ..spec.moe import MoeConfig
from .copies import Copies, Inline
from .direct import DirectFile
from .dram import Source
from .expert_dram import ExpertDram
from .expert_memory import ExpertMemory, Job, most_at_once, slot_bytes
from .expert_report import ExpertReport
from .expert_slots import Slots, State
from .form import Record, faulty, names_within
from .guessing import Guessing
from .store import Store
from .streamer import PIECE, WORKERS, damaged
from .uses import Expert, Policy, Uses

_AHEAD = 2
"""Parts of a prompt's experts that are read ahead of the one computed with."""


class ExpertCache:
    """Holds the experts of a store's mixtures, as many as `resize` allows.

    `guess`: whether a step of one sequence reads the next layer's likeliest expert ahead; None where it pays.
    """

    def __init__(
        self,
        file: DirectFile,
        store: Store,
        config: ModelConfig,
        *,
        policy: Policy = Policy.NEXT_USE,
        guess: bool | None = None,
        copies: Copies | None = None,
    ) -> None:
        self._file, self._guess = file, guess
        self._guessing = Guessing()
        self._likeliest: Expert | None = None
        """The expert that the next layer probably needs, if it is not in memory."""
        self._ended: tuple[int, float] | None = None
        """The layer that a step of one sequence fetched for last, and when it was there."""
        layers = [index for index, layer in enumerate(config.layers) if isinstance(layer.mlp, MoeConfig)]
        mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig)]
        self._records = [store.experts[index] for index in layers]
        experts, top_k = ([getattr(each.router, name) for each in mixtures] for name in ("experts", "top_k"))
        self._slots = Slots(Uses(experts, top_k, policy), kept=0, spare=0)
        self.slot_bytes = slot_bytes(store)
        room = sum(experts) + max(experts) + most_at_once(config, PASS_ROWS) + 2
        self._copies = copies or Inline()
        self._memory = ExpertMemory(self._copies, self.slot_bytes, room)
        self._dram = ExpertDram(self._copies, self.slot_bytes)
        self._layers = {index: _Layer(self, place) for place, index in enumerate(layers)}
        self._matrices = [self._views(of_layer[0], room) for of_layer in self._records]
        self._examples: dict[int, _Example] = {}
        self._routers: dict[int, Matrix] = {}
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(WORKERS)
        self._left: dict[int, int] = {}
        """For each slot that is being read into, the pieces that are not there yet."""
        self._jobs = 0
        """Experts that are being read or copied."""
        self._disk_bytes = 0
        """Asked of the disk so far."""
        self._failures: dict[int, Exception] = {}
        self._verified: set[int] = set()
        self._used: set[Expert] = set()
        """The experts of the step's layer that is under way."""
        self.report = ExpertReport()

    def resize(self, *, kept: int, spare: int, dram: int = 0) -> None:
        """Keep another number of experts, and have another number of slots to read into; `dram` stay in DRAM."""
        with self._changed:
            self._settle()
            while self._jobs:
                self._changed.wait()
            self._copies.finish()
            if self._memory.resize(kept + spare):
                self._slots.resize(kept=0, spare=0)
                self._matrices = [self._views(of_layer[0], self._memory.room) for of_layer in self._records]
                self._examples.clear()
            self._slots.resize(kept=kept, spare=spare)
            self._dram.resize(dram)
            self.report.kept, self.report.spare = kept, spare

    def count_anew(self) -> None:
        """Begin a report of what is read from now on."""
        self.report = ExpertReport(kept=self.report.kept, spare=self.report.spare)

    def attached(self, index: int, layer: Layer, *, example: bool = False) -> Layer:
        """Return a layer of the model whose experts come from here; one without experts is as it was.

        Those of an example, by which pieces are compiled or timed, are what lies in slot 0: nothing is read.
        """
        place = self._layers.get(index)
        if place is None:
            return layer
        assert isinstance(layer.mlp, Moe)
        if not example and place.place not in self._routers:
            self._routers[place.place] = _copied(layer.mlp.router)
        matrices = self._matrices[place.place]
        fetcher = self._examples.setdefault(index, _Example(matrices)) if example else place
        return layer._replace(mlp=layer.mlp._replace(experts=Mlp(*matrices), fetcher_1=fetcher.number_1))

    def close(self) -> None:
        """End the threads; closing twice does nothing."""
        self._pool.shutdown()
        self._memory.close()
        self._dram.resize(0)

    def fetch(self, place: int, experts: Sequence[int], x_TM: Tensor) -> dict[int, int]:
        """Bring experts of a layer into memory together; returns their slots, which stay until the next call."""
        wanted = [(place, expert) for expert in dict.fromkeys(experts)]
        begin_s, alone = time.perf_counter(), len(x_TM) == 1
        with self._changed:
            self._settle()
            if self._likeliest is not None and self._likeliest[0] == place:
                self._guessing.note(right=self._likeliest in wanted)
            before = self._slots.guessed
            found = {each: slot for each in wanted if (slot := self._slots.find(each)) is not None}
            for slot in found.values():
                self._slots.want(slot)
            self._slots.drop_guesses()
            self.report.note_step(wanted, [each for each in found if found[each] not in before], self._nbytes)
            self.report.guessed_right += len(before & set(found.values()))
            missing, before_bytes = [each for each in wanted if each not in found], self._disk_bytes
            for each in missing:
                found[each] = self._claimed(each)
            self.report.read_bytes += self._disk_bytes - before_bytes
            for slot in found.values():
                self._wait(slot)
                self._copies.arrive(slot)
                self._slots.use(slot)
            self._used = set(wanted)
            end_s = time.perf_counter()
            if alone and self._ended is not None and self._ended[0] == place - 1:
                read_s = (end_s - begin_s) / len(missing) if missing else None
                self._guessing.note_seconds(compute_s=begin_s - self._ended[1], read_s=read_s)
            self._ended = (place, end_s) if alone else None
            self._likeliest = self._expected(place + 1, x_TM[0]) if alone and self._guess is not False else None
            if self._likeliest is not None and (self._guess or self._guessing.pays):
                self._read_guess(self._likeliest)
        return {expert: slot for (_, expert), slot in found.items()}

    def pass_through(self, place: int, experts: Sequence[int], part: int) -> Iterator[tuple[int, Matrix]]:
        """Yield one part of each of these experts, those first that are here; nothing goes to make room."""
        taken: deque[tuple[int, int]] = deque()
        with self._changed:
            self._settle()
            self._slots.drop_guesses()
            for expert in experts:
                slot = self._slots.find((place, expert), part)
                if slot is not None:
                    self._wait(slot)
                    self._copies.arrive(slot)
                    self._slots.use(slot)
                    taken.append((expert, slot))
        here = {expert for expert, _ in taken}
        others = deque(expert for expert in experts if expert not in here)
        try:
            while taken or others:
                with self._changed:
                    self._read_ahead(place, part, taken, others)
                    while not taken:
                        assert self._left, "no slot is free, and none is going to be"
                        self._changed.wait()
                        self._read_ahead(place, part, taken, others)
                    expert, slot = taken[0]
                    self._wait(slot)
                    self._copies.arrive(slot)
                    if self._slots.state(slot) is State.READY:
                        self._slots.use(slot)
                yield expert, one_expert(self._matrices[place][part], slot)
                with self._changed:
                    taken.popleft()
                    self._copies.leave(slot)
                    self._slots.done(slot)
        finally:
            with self._changed:
                for _, slot in taken:
                    if self._slots.state(slot) is State.IN_USE:
                        self._copies.leave(slot)
                        self._slots.done(slot)

    def _read_ahead(self, place: int, part: int, taken: deque[tuple[int, int]], others: deque[int]) -> None:
        """Begin to read experts while slots are free, whole ones while fewer are held than may be."""
        while others and len(taken) < 1 + _AHEAD:
            whole = self._slots.held < self._slots.kept
            slot = self._slots.claim((place, others[0]), None if whole else part)
            if slot is None:
                return
            expert, before_bytes = others.popleft(), self._disk_bytes
            self._read(slot, (place, expert), None if whole else part)
            self.report.prompt_bytes += self._disk_bytes - before_bytes
            taken.append((expert, slot))

    def _expected(self, place: int, x_M: Tensor) -> Expert | None:
        """Return the expert that a layer's router would choose for another layer's hidden vector, if it is not here."""
        router = self._routers.get(place)
        if router is None:
            return None
        score_E = router.word @ x_M.to(router.word.dtype)
        if router.bias_N is not None:
            score_E = score_E + router.bias_N
        likeliest = place, int(score_E.argmax())
        return likeliest if self._slots.find(likeliest) is None else None

    def _read_guess(self, expert: Expert) -> None:
        slot, before_bytes = self._slots.claim(expert, guess=True), self._disk_bytes
        if slot is not None:
            self._read(slot, expert, None)
            self.report.note_guess(self._disk_bytes - before_bytes)

    def _settle(self) -> None:
        for slot in self._slots.in_use:
            self._copies.leave(slot)
        self._slots.settle(self._used)
        self._used = set()

    def _claimed(self, expert: Expert) -> int:
        """Return a slot that is being read into; waits where guesses that were wrong are still being read."""
        while (slot := self._slots.claim(expert)) is None:
            assert self._left, "there are fewer spare slots than experts at once"
            self._changed.wait()
        self._read(slot, expert, None)
        return slot

    def _read(self, slot: int, expert: Expert, part: int | None) -> None:
        """Have the threads bring an expert, or a part of it, into a slot. The lock is held."""
        records = self._records[expert[0]][expert[1]]
        chosen = records if part is None else (records[part],)
        begin, nbytes = records[0].nbytes if part else 0, sum(record.nbytes for record in chosen)
        target = self._memory.part(slot, begin, nbytes)
        held = self._dram.find(expert)
        evict = part is None and self._slots.held > self._slots.kept  # never for a prompt, which reads no more than fit
        if held is not None:
            job = Job(slot, expert, Source.COPY, (), held[:0], held[begin : begin + nbytes], target)
        elif (place := self._dram.claim(expert, evict=evict)) is not None:
            whole = place[: sum(record.nbytes for record in records)]
            job = Job(slot, expert, Source.FILL, records, whole, place[begin : begin + nbytes], target)
        else:
            host = self._memory.host()[:nbytes] if self._copies.staged else target
            assert isinstance(host, memoryview)
            job = Job(slot, expert, Source.DISK, chosen, host, host, target)
        starts = range(0, max(1, len(job.read)), PIECE)
        self._left[slot] = len(starts)
        self._jobs += 1
        self._disk_bytes += len(job.read)
        self._failures.pop(slot, None)  # what nobody waited for
        for start in starts:
            self._pool.submit(self._work, job, start)

    def _work(self, job: Job, start: int) -> None:
        """Read a piece, and after a slot's last piece verify what was read for the first time: a thread's task."""
        failure: Exception | None = None
        if job.source is not Source.COPY:
            try:
                piece, offset = job.read[start : start + PIECE], job.records[0].offset + start
                self._file.read_into(piece, offset, names_within(job.records, offset, len(piece)))
            except Exception as error:
                failure = error
        with self._changed:
            if failure is not None:
                self._failures.setdefault(job.slot, failure)
            self._left[job.slot] -= 1
            if self._left[job.slot]:
                return
            failure = self._failures.get(job.slot)
        if failure is None:
            try:
                self._verify(job.records, job.read)
            except Exception as error:  # whatever it is: who waits for the slot is told, and waits no more
                failure = error
        try:
            self._end(job, failure)
        finally:
            with self._changed:
                self._jobs -= 1
                self._changed.notify_all()

    def _end(self, job: Job, failure: Exception | None) -> None:
        """Bring an expert into its slot, all of whose bytes were read, unless that failed."""
        copied = failure is None and job.host is not job.target
        try:
            if copied:
                assert isinstance(job.host, memoryview)
                self._copies.copy(job.slot, job.target, job.host)
        except Exception as error:
            copied, failure = False, error
        with self._changed:
            if job.source is Source.FILL:
                (self._dram.filled if failure is None else self._dram.failed)(job.expert)
            del self._left[job.slot]
            if failure is None:
                self._slots.filled(job.slot)
            else:
                self._failures[job.slot] = failure
                self._slots.failed(job.slot)
            self._changed.notify_all()
        if copied:
            self._copies.settle(job.slot)
        with self._changed:
            if job.source is Source.COPY or (job.source is Source.FILL and failure is None):
                self._dram.done(job.expert)
            elif job.source is Source.DISK and self._copies.staged:
                self._memory.give_back(job.read)

    def _verify(self, records: Sequence[Record], buffer: memoryview) -> None:
        """Raise `CheckpointError` for the first record that is not what was written."""
        begin = 0
        for record in records:
            if record.offset not in self._verified:
                if fault := faulty(record, buffer[begin : begin + record.nbytes]):
                    raise damaged(self._file, record, fault)
                self._verified.add(record.offset)
            begin += record.nbytes

    def _wait(self, slot: int) -> None:
        """Wait until a slot's bytes are there; raises what went wrong with reading them. The lock is held."""
        while slot in self._left:
            self._changed.wait()
        failure = self._failures.pop(slot, None)
        if failure is not None:
            raise failure

    def _nbytes(self, expert: Expert, part: int | None = None) -> int:
        records = self._records[expert[0]][expert[1]]
        return sum(record.nbytes for record in (records if part is None else (records[part],)))

    def _views(self, records: tuple[Record, Record], room: int) -> tuple[Matrix, Matrix]:
        """Return an expert's matrices with all slots in front, of which there may be `room`."""
        return self._memory.views(records)


def _copied(router: Matrix) -> Matrix:
    bias_N = None if router.bias_N is None else router.bias_N.clone()
    return router._replace(word=router.word.clone(), bias_N=bias_N)


class _Layer:
    """Implements `compiled.fetching.Fetcher` for one layer."""

    def __init__(self, cache: ExpertCache, place: int) -> None:
        self._cache, self.place = cache, place
        self.number_1 = register(self)

    def slots(self, expert_TK: Tensor, x_TM: Tensor) -> Tensor:
        chosen = expert_TK.flatten().tolist()
        slots = self._cache.fetch(self.place, chosen, x_TM)
        return torch.tensor([slots[expert] for expert in chosen], device=expert_TK.device).view(expert_TK.shape)

    def matrices(self, experts: Sequence[int], part: int) -> Iterator[tuple[int, Matrix]]:
        return self._cache.pass_through(self.place, experts, part)


class _Example:
    """Stands for a layer's experts while pieces are compiled."""

    def __init__(self, matrices: tuple[Matrix, Matrix]) -> None:
        self._matrices = matrices
        self.number_1 = register(self)

    def slots(self, expert_TK: Tensor, x_TM: Tensor) -> Tensor:
        return torch.zeros_like(expert_TK)

    def matrices(self, experts: Sequence[int], part: int) -> Iterator[tuple[int, Matrix]]:
        for expert in experts:
            yield expert, one_expert(self._matrices[part], 0)
