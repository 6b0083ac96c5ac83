"""What this machine's disk and processor do now, and what a plan's steps will take by it."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiled.linear import PASS_ROWS, product
from ..spec.ambient import CPU
from .copies import copies_for
from .direct import DirectFile, aligned_buffer
from .events import Event, Kind
from .path import OffloadPath
from .plan import PREFILL_TOKENS, Plan, call_bytes, chosen_bytes
from .sequences import TieredSequences
from .store import Store
from .streamer import Streamer

_ENOUGH_S = 1.0

RUNS = 2
"""The better of so many counts: the first of a size also prepares for it."""

MARGIN = 1.1
"""What a batch has beyond the least that hides the reads: speeds vary while a run goes on."""

_GEMM = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Bytes and operations a second."""

    disk: float
    """Bytes a second, read directly, as the streamer reads."""
    memory: float
    """Bytes a second, read by one sum."""
    copies: float
    """Bytes a second, from the host's memory into a buffer of the ring."""
    gemm: float
    """Float operations a second of a product of many rows."""
    direct: bool
    """Whether the page cache was passed by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Seconds of computing, of one pass through all layers and the head while nothing of the weights is read."""

    layers_s: float
    head_s: float
    rest_s: float
    """Before the layers and after the head: rows of the token table, positions, logits."""

    @property
    def total_s(self) -> float:
        return self.layers_s + self.head_s + self.rest_s

    def times(self, factor: float) -> "Sweep":
        return Sweep(layers_s=factor * self.layers_s, head_s=factor * self.head_s, rest_s=factor * self.rest_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a decode step of a batch takes, sequences being half as long as is planned."""

    computing: Sweep
    kv_s: float
    """What a step's keys and values take to be read and written where they are away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the prompts of some sequences take that go through the layers together."""

    computing: Sweep
    count: int
    tokens: int
    """Of each."""
    together: int
    """As many would go through the layers together if there were so many: what the plan has room for."""
    read_bytes: int
    """What a sweep with as many reads: of experts all that they can choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds, and the number of tokens in a step from which on its computation hides the reads."""

    step_s: float
    """A decode step of the whole batch."""
    token_s: float
    prompt_token_s: float
    hiding_tokens: float


def measure(store: Store, slots: int, device: torch.device = CPU) -> Speeds:
    """Measure for about a second each; the disk with a ring of so many buffers, on which its rate depends.

    Memory, copies and products are those of a device.

    Of records smaller than a piece one is read by one thread: with two buffers two threads read, with four all do.
    """
    file = DirectFile(store.weights)
    try:
        return Speeds(
            disk=_disk(store, file, slots),
            memory=_memory(device),
            copies=_copies(device),
            gemm=_gemm(device),
            direct=file.direct,
        )
    finally:
        file.close()


def compute(path: OffloadPath, batch: int, reserve: int, prompt: int | None = None) -> tuple[Step, Prompts]:
    """Measure a step and prompts of a path that is compiled, with layers that stay where they are.

    Prompts are as long as `reserve` unless their length is given. Of short ones several are measured, `PREFILL_TOKENS`
    tokens at most: the second takes less than the first, since a layer's weights are in the processor's caches then.
    """
    step = compute_step(path, batch, reserve)
    assert path.plan is not None
    tokens = min(prompt or reserve, PREFILL_TOKENS)
    together = max(1, path.plan.flight_bytes // call_bytes(path.store, path.config, tokens, tokens))
    count = max(1, min(batch, together, PREFILL_TOKENS // tokens))
    given_BT = _drawn(path, count, tokens)
    with path.still():
        sweeps = [_still(path, path.open(count, reserve), given_BT)[0] for _ in range(RUNS)]
    path.open(batch, reserve).close()  # the plan and its room as they were
    assert path.plan is not None
    computing, rows = min(sweeps, key=lambda each: each.total_s), min(batch, together) * tokens
    experts = chosen_bytes(path.store, path.config, rows) - chosen_bytes(path.store, path.config, batch)
    read_bytes = path.plan.step_bytes + experts
    return step, Prompts(computing=computing, count=count, tokens=tokens, together=together, read_bytes=read_bytes)


def compute_step(path: OffloadPath, batch: int, reserve: int) -> Step:
    """Measure a decode step of a path that is compiled, with layers that stay where they are."""
    given_BT = _drawn(path, batch, RUNS)
    with path.still():
        sequences = path.open(batch, reserve)
        sequences.advance([max(0, reserve // 2 - RUNS)] * batch, sequences.last_BV)
        sequences.rewrite()
        steps = [_still(path, sequences, given_BT[:, at, None]) for at in range(RUNS)]
        sequences.close()
    computing, kv_s = min(steps, key=lambda each: each[0].total_s)
    return Step(computing=computing, kv_s=kv_s)


def _drawn(path: OffloadPath, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(path.config.vocabulary, (batch, tokens), generator=generator)


def _still(path: OffloadPath, sequences: TieredSequences, tokens_BT: Tensor) -> tuple[Sweep, float]:
    """Return what extending takes without waits, and what reading and writing keys and values does."""
    begin_s = time.perf_counter()
    path.extend(sequences, list(tokens_BT))
    copies_for(path.device).drain()
    passed_s = time.perf_counter() - begin_s
    head = len(path.store.schedule) - len(path.store.head)
    return seen([each for each in path.events if each.begin_s >= begin_s], head, passed_s)


def seen(events: Sequence[Event], head: int, passed_s: float) -> tuple[Sweep, float]:
    """Return by the events of a call what computing takes, and keys and values; `head` is the head's first record."""

    def spent_s(*kinds: Kind) -> float:
        return sum(each.end_s - each.begin_s for each in events if each.kind in kinds)

    uses = [each for each in events if each.kind is Kind.USE]
    head_s = sum(each.end_s - each.begin_s for each in uses if each.record >= head)
    layers_s = spent_s(Kind.USE) - head_s - spent_s(Kind.KV_WAIT)
    rest_s = passed_s - spent_s(Kind.USE, Kind.WAIT)
    return Sweep(layers_s=layers_s, head_s=head_s, rest_s=rest_s), spent_s(Kind.KV_READ, Kind.KV_WRITE)


def predict(store: Store, plan: Plan, speeds: Speeds, step: Step, prompts: Prompts) -> Prediction:
    """Return what a step takes, and a token of prompts that share the weights of a sweep where there is room."""
    step_s = predict_step(store, plan, speeds, step)
    sweeps = -(-plan.batch // prompts.together)
    computing = prompts.computing.times(plan.batch / sweeps / prompts.count)
    prompts_s = sweeps * swept_s(store, plan, prompts.read_bytes, 0.0, speeds, computing)
    return Prediction(
        step_s=step_s,
        token_s=step_s / plan.batch,
        prompt_token_s=prompts_s / (plan.batch * prompts.tokens),
        hiding_tokens=plan.batch * plan.fetch_s(speeds.disk, speeds.copies) / step.computing.total_s,
    )


def predict_step(store: Store, plan: Plan, speeds: Speeds, step: Step) -> float:
    """Return what a decode step takes: reading and computing go on at once."""
    return swept_s(store, plan, plan.step_bytes, step.kv_s, speeds, step.computing)


def swept_s(store: Store, plan: Plan, read_bytes: int, kv_s: float, speeds: Speeds, computing: Sweep) -> float:
    """Return what a sweep takes, one after another, that reads so many bytes of the store.

    The longer of reading and computing would be too little: a block of the head takes long to read and little to
    compute for a prompt, and the ring holds too few records for the layers' computation to hide that. The layers'
    computing is divided among their records by size, and so is what is read besides: experts, keys and values.
    """
    head, kept = len(store.schedule) - len(store.head), set(plan.dram_records)
    disk = min(speeds.disk, speeds.copies) if plan.staging_bytes else speeds.disk  # what is read is copied then
    reads = [record.nbytes / (speeds.copies if place in kept else disk) for place, record in enumerate(store.schedule)]
    scheduled = sum(record.nbytes for place, record in enumerate(store.schedule) if place not in kept)
    more_s = max(0, read_bytes - scheduled) / disk + kv_s
    layers_bytes = sum(record.nbytes for record in store.schedule[:head])
    head_bytes = sum(record.nbytes for record in store.head)
    uses = []
    for place, record in enumerate(store.schedule):
        if place < head:
            share = record.nbytes / layers_bytes
            reads[place] += more_s * share
            uses.append(computing.layers_s * share)
        else:
            uses.append(computing.head_s * record.nbytes / head_bytes)
    return sweep_s(reads, uses, plan.slots, computing.rest_s)


def sweep_s(reads: Sequence[float], uses: Sequence[float], slots: int, rest_s: float) -> float:
    """Return the seconds of one of many sweeps over records that take so long to read and to use.

    A record is read when the one before it has been and a buffer is free; it is used when it is there and the one
    before it has been used. Each sweep begins with `rest_s` in which nothing is used.

        >>> sweep_s([1.0, 1.0], [3.0, 3.0], slots=2, rest_s=0.0), sweep_s([1.0, 1.0], [3.0, 3.0], slots=1, rest_s=0.0)
        (6.0, 8.0)
    """
    read_s = 0.0
    freed: deque[float] = deque([0.0] * slots, maxlen=slots)
    begins = []
    for _ in range(3):
        begins.append(freed[-1])
        now_s = freed[-1] + rest_s
        for read, use in zip(reads, uses, strict=True):
            read_s = max(read_s, freed[0]) + read
            now_s = max(now_s, read_s) + use
            freed.append(now_s)
    return freed[-1] - begins[-1]


def best_batch(path: OffloadPath, reserve: int, prompts: int) -> int:
    """Return how many of some prompts to run at once: as many as hide the reads, if the budget has room for them.

    A step of B tokens hides them if B >= F * bytes_per_weight / (2 * BW), with BW the disk's bytes and F the operations
    a second at which the step is computed: 2 W B / (its seconds), so that B seconds_of_reading / seconds_of_computing
    is the least one. F grows with B, so it is measured again at what it yields. More sequences than memory holds move
    keys and values to the disk, which is done where the step is predicted to yield more tokens a second.
    """
    path.open(1, reserve).close()
    assert path.plan is not None
    speeds = measure(path.store, path.plan.slots, path.device)
    here, most = (min(prompts, path.most_batch(reserve, away=away)) for away in (False, True))

    def hiding(batch: int) -> tuple[int, float]:
        """Return the batch that hides the reads by what one of `batch` takes, and that one's seconds a token."""
        step = compute_step(path, batch, reserve)
        assert path.plan is not None
        hiding_tokens = batch * path.plan.fetch_s(speeds.disk, speeds.copies) / step.computing.total_s
        return math.ceil(hiding_tokens * MARGIN), predict_step(path.store, path.plan, speeds, step) / batch

    return search_batch(here, most, prompts, hiding)


def search_batch(here: int, most: int, prompts: int, hiding: Callable[[int], tuple[int, float]]) -> int:
    """Return the batch for some prompts, of `here` sequences with all keys and values in memory, `most` without.

    `hiding` measures what a step of a batch takes; it returns the batch that hides the reads by that, and seconds a
    token.
    """
    batch, token_s = 0, math.inf
    wanted = min(here, PASS_ROWS)
    while wanted > batch:
        batch = wanted
        least, token_s = hiding(batch)
        wanted = min(here, least, 8 * batch)
    if least > here and most > here:
        larger = min(most, least)
        if hiding(larger)[1] < token_s:
            batch = larger
    runs = -(-prompts // batch)
    return -(-prompts // runs)


def _disk(store: Store, file: DirectFile, slots: int) -> float:
    """Sweep over the store without computing, for about a second."""
    streamer = Streamer(file, store.schedule, slots)
    streamer._reading.verified.update(range(len(store.schedule)))  # a run verifies once, and reads many times
    begin_s, done = time.perf_counter(), 0
    try:
        while time.perf_counter() - begin_s < _ENOUGH_S:
            for record, _ in zip(store.schedule, streamer.sweep(), strict=False):
                done += record.nbytes
                if time.perf_counter() - begin_s >= _ENOUGH_S:
                    break
        return done / (time.perf_counter() - begin_s)
    finally:
        streamer.close()


def _memory(device: torch.device) -> float:
    tensor = torch.frombuffer(aligned_buffer(64 << 20), dtype=torch.float32).fill_(1.0).to(device)
    return _rate(tensor.nbytes, lambda: tensor.sum(), device)


def _copies(device: torch.device) -> float:
    copies = copies_for(device)
    source, target = copies.host_buffer(64 << 20), copies.device_buffer(64 << 20)

    def copy() -> None:
        copies.copy(0, target, source)
        copies.settle(0)

    try:
        return _rate(len(source), copy, device)
    finally:
        copies.free(source)


def _gemm(device: torch.device) -> float:
    x, weight = torch.ones(_GEMM, _GEMM, device=device), torch.ones(_GEMM, _GEMM, device=device)
    return _rate(2 * _GEMM**3, lambda: product(x, weight, None), device)


def _rate(work: int, call: Callable[[], object], device: torch.device) -> float:
    """Return the best of several runs."""
    best, copies = float("inf"), copies_for(device)
    for _ in range(5):
        begin_s = time.perf_counter()
        call()
        copies.drain()
        best = min(best, time.perf_counter() - begin_s)
    return work / best
