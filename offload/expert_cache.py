"""Experts on demand: a layer's chosen experts are read from the disk when its router has chosen them.

A token needs k of a layer's E experts, so reading all of them would read E / k times what is used. Which they are is
known only in the middle of the layer; there the computation stops (`compiled.fetching`) until they are in memory. What
was read stays for the next tokens as far as the budget goes (`expert_slots`, `uses`). A prompt reads each expert that
any of its tokens chose, a part at a time, past what is kept: free slots are filled on the way, but nothing goes.

Slots lie in one span of addresses with room for all experts, of which memory is taken for those slots only that the
plan allows; so a compiled layer is the same within any budget.

Shapes: T tokens, K = top_k, M hidden.
"""

import mmap
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
from .direct import DirectFile
from .expert_report import ExpertReport
from .expert_slots import Slots, State
from .form import Placed, Record, faulty, rebuilt
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
        self._buffer = _unbacked(room * self.slot_bytes)
        self._layers = {index: _Layer(self, place) for place, index in enumerate(layers)}
        self._matrices = [self._views(of_layer[0], room) for of_layer in self._records]
        self._examples: dict[int, _Example] = {}
        self._routers: dict[int, Matrix] = {}
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(WORKERS)
        self._left: dict[int, int] = {}
        """For each slot that is being read into, the pieces that are not there yet."""
        self._failures: dict[int, Exception] = {}
        self._verified: set[int] = set()
        self._used: set[Expert] = set()
        """The experts of the step's layer that is under way."""
        self.report = ExpertReport()

    def resize(self, *, kept: int, spare: int) -> None:
        """Keep another number of experts, and have another number of slots to read into."""
        with self._changed:
            self._settle()
            while self._left:
                self._changed.wait()
            self._slots.resize(kept=kept, spare=spare)
            if hasattr(mmap, "MADV_DONTNEED"):
                begin = (kept + spare) * self.slot_bytes
                if begin < len(self._buffer):
                    self._buffer.madvise(mmap.MADV_DONTNEED, begin)
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
            missing = [each for each in wanted if each not in found]
            for each in missing:
                found[each] = self._claimed(each)
                self.report.read_bytes += self._nbytes(each)
            for slot in found.values():
                self._wait(slot)
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
                    if self._slots.state(slot) is State.READY:
                        self._slots.use(slot)
                yield expert, one_expert(self._matrices[place][part], slot)
                with self._changed:
                    taken.popleft()
                    self._slots.done(slot)
        finally:
            with self._changed:
                for _, slot in taken:
                    if self._slots.state(slot) is State.IN_USE:
                        self._slots.done(slot)

    def _read_ahead(self, place: int, part: int, taken: deque[tuple[int, int]], others: deque[int]) -> None:
        """Begin to read experts while slots are free, whole ones while fewer are held than may be."""
        while others and len(taken) < 1 + _AHEAD:
            whole = self._slots.held < self._slots.kept
            slot = self._slots.claim((place, others[0]), None if whole else part)
            if slot is None:
                return
            expert = others.popleft()
            self._read(slot, (place, expert), None if whole else part)
            self.report.prompt_bytes += self._nbytes((place, expert), None if whole else part)
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
        slot = self._slots.claim(expert, guess=True)
        if slot is not None:
            self._read(slot, expert, None)
            self.report.note_guess(self._nbytes(expert))

    def _settle(self) -> None:
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
        """Have the threads read an expert, or a part of it, into a slot. The lock is held."""
        records = self._records[expert[0]][expert[1]]
        begin = slot * self.slot_bytes + (records[0].nbytes if part else 0)
        chosen = records if part is None else (records[part],)
        offset, nbytes = chosen[0].offset, sum(record.nbytes for record in chosen)
        starts = range(0, nbytes, PIECE)
        self._left[slot] = len(starts)
        self._failures.pop(slot, None)  # what nobody waited for
        buffer = memoryview(self._buffer)[begin : begin + nbytes]
        for start in starts:
            self._pool.submit(self._work, slot, chosen, buffer, offset, start)

    def _work(self, slot: int, records: Sequence[Record], buffer: memoryview, offset: int, start: int) -> None:
        """Read a piece, and after a slot's last piece verify what was read for the first time: a thread's task."""
        failure: Exception | None = None
        try:
            piece = buffer[start : start + PIECE]
            self._file.read_into(piece, offset + start, _names(records, offset + start, len(piece)))
        except Exception as error:
            failure = error
        with self._changed:
            if failure is not None:
                self._failures.setdefault(slot, failure)
            self._left[slot] -= 1
            if self._left[slot]:
                return
            failure = self._failures.get(slot)
        if failure is None:
            try:
                self._verify(records, buffer)
            except Exception as error:  # whatever it is: who waits for the slot is told, and waits no more
                failure = error
        with self._changed:
            del self._left[slot]
            if failure is None:
                self._slots.filled(slot)
            else:
                self._failures[slot] = failure
                self._slots.failed(slot)
            self._changed.notify_all()

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
        """Return an expert's matrices with all slots in front."""
        stride, buffer = self.slot_bytes, memoryview(self._buffer)

        def view(record: Record, begin: int) -> Matrix:
            def found(placed: Placed) -> Tensor:
                if placed.nbytes == 0:
                    return torch.empty(room, *placed.shape, dtype=placed.dtype)
                flat = torch.frombuffer(buffer[begin + placed.offset :], dtype=placed.dtype)
                strides = torch.empty(placed.shape, device="meta").stride()
                return flat.as_strided((room, *placed.shape), (stride // placed.dtype.itemsize, *strides))

            matrix: Matrix = rebuilt(record.form, found)
            return matrix

        return view(records[0], 0), view(records[1], records[0].nbytes)


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
        return torch.tensor([slots[expert] for expert in chosen]).view(expert_TK.shape)

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


def slot_bytes(store: Store) -> int:
    """Return the bytes of the largest expert; 0 where there are none."""
    sizes = (up.nbytes + down.nbytes for layer in store.experts for up, down in layer)
    return max(sizes, default=0)


def most_at_once(config: ModelConfig, rows: int) -> int:
    """Return how many experts of a layer as many rows can choose at most."""
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoeConfig)]
    return max((min(each.router.experts, rows * each.router.top_k) for each in mixtures), default=0)


def _unbacked(nbytes: int) -> mmap.mmap:
    """Return addresses for so many bytes, of which memory is taken as pages are first written."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, nbytes)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, nbytes, flags=flags)


def _names(records: Sequence[Record], begin: int, nbytes: int) -> str:
    """Return the names of the records that lie in so many bytes of the file."""
    return " and ".join(
        each.name for each in records if each.offset < begin + nbytes and begin < each.offset + each.nbytes
    )
