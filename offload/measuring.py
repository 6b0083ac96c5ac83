"""What this machine's disk and processor do now, and what a plan's steps will take by it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..compiled.linear import PASS_ROWS, product
from ..spec.ambient import CPU
from .copies import copies_for
from .direct import DirectFile, aligned_buffer
from .events import Kind
from .path import OffloadPath
from .plan import MOST_SLOTS, PREFILL_TOKENS, Plan
from .sequences import TieredSequences
from .store import Store
from .streamer import Streamer

_ENOUGH_S = 1.0

_RUNS = 2
"""The better of so many counts: the first of a size also prepares for it."""

_MARGIN = 1.1
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
    """Bytes a second, from DRAM into a buffer of the ring."""
    gemm: float
    """Float operations a second of a product of many rows."""
    direct: bool
    """Whether the page cache was passed by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """Seconds that computing takes while nothing of the weights is read."""

    step_s: float
    """A decode step of the batch, sequences being half as long as is planned."""
    prompt_s: float
    """The prompt of one sequence, of `prompt_tokens` tokens."""
    prompt_tokens: int
    kv_s: float
    """What a step's keys and values take to be read and written where they lie in a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Seconds, and the number of tokens in a step from which on its computation hides the reads."""

    step_s: float
    """A decode step of the whole batch."""
    token_s: float
    prompt_token_s: float
    hiding_tokens: float


def measure(store: Store) -> Speeds:
    """Measure for about a second each."""
    file = DirectFile(store.weights)
    try:
        return Speeds(disk=_disk(store, file), memory=_memory(), copies=_copies(), gemm=_gemm(), direct=file.direct)
    finally:
        file.close()


def compute(path: OffloadPath, batch: int, reserve: int, prompt: int | None = None) -> Computed:
    """Measure a step and a prompt of a path that is compiled, with layers that stay where they are.

    The prompt is as long as `reserve` unless its length is given.
    """
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(path.config.vocabulary, (batch, reserve), generator=generator)
    prompt_tokens = min(prompt or reserve, PREFILL_TOKENS)
    with path.still():
        prompts = [_still_s(path, path.open(1, reserve), tokens_BT[:1, :prompt_tokens]) for _ in range(_RUNS)]
        sequences = path.open(batch, reserve)
        sequences.advance([max(0, reserve // 2 - _RUNS)] * batch, sequences.last_BV)
        steps = [_still_s(path, sequences, tokens_BT[:, at, None]) for at in range(_RUNS)]
        sequences.close()
    (prompt_s, _), (step_s, kv_s) = min(prompts), min(steps)
    return Computed(step_s=step_s, prompt_s=prompt_s, prompt_tokens=prompt_tokens, kv_s=kv_s)


def _still_s(path: OffloadPath, sequences: TieredSequences, tokens_BT: Tensor) -> tuple[float, float]:
    """Return the seconds of extending without waits, and those of reading and writing keys and values."""
    begin_s = time.perf_counter()
    path.extend(sequences, list(tokens_BT))
    passed_s = time.perf_counter() - begin_s
    spent = {
        kind: sum(e.end_s - e.begin_s for e in path.events if e.kind is kind and e.begin_s >= begin_s) for kind in Kind
    }
    return passed_s - spent[Kind.WAIT] - spent[Kind.KV_WAIT], spent[Kind.KV_READ] + spent[Kind.KV_WRITE]


def predict(plan: Plan, speeds: Speeds, computed: Computed) -> Prediction:
    """Return what a step takes: reading and computing go on at once, so the longer of the two.

    The prompts of a batch share the weights of a sweep as far as the plan has room for what they are on their way.
    """
    fetch_s = plan.fetch_s(speeds.disk, speeds.copies)
    step_s = max(computed.step_s, fetch_s + computed.kv_s)
    together = max(1, plan.flight_bytes // plan.prompt_bytes)
    sweeps = -(-plan.batch // together)
    prompts_s = sweeps * max(fetch_s, computed.prompt_s * plan.batch / sweeps)
    return Prediction(
        step_s=step_s,
        token_s=step_s / plan.batch,
        prompt_token_s=prompts_s / (plan.batch * computed.prompt_tokens),
        hiding_tokens=plan.batch * fetch_s / computed.step_s,
    )


def best_batch(path: OffloadPath, reserve: int, prompts: int) -> int:
    """Return how many of some prompts to run at once: as many as hide the reads, if the budget has room for them.

    A step of B tokens hides them if B >= F * bytes_per_weight / (2 * BW), with BW the disk's bytes and F the operations
    a second at which the step is computed: 2 W B / (its seconds), so that B seconds_of_reading / seconds_of_computing
    is the least one. F grows with B, so it is measured again at what it yields. More sequences than memory holds move
    keys and values to the disk, which is done where the step is predicted to yield more tokens a second.
    """
    speeds = measure(path.store)
    here, most = (min(prompts, path.most_batch(reserve, away=away)) for away in (False, True))

    def hiding(batch: int) -> tuple[int, float]:
        """Return the batch that hides the reads by what one of `batch` takes, and that one's seconds a token."""
        computed = compute(path, batch, reserve)
        assert path.plan is not None
        predicted = predict(path.plan, speeds, computed)
        return math.ceil(predicted.hiding_tokens * _MARGIN), predicted.token_s

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


def _disk(store: Store, file: DirectFile) -> float:
    """Sweep over the store without computing, for about a second."""
    streamer = Streamer(file, store.schedule, MOST_SLOTS)
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


def _memory() -> float:
    tensor = torch.frombuffer(aligned_buffer(64 << 20), dtype=torch.float32).fill_(1.0)
    return _rate(tensor.nbytes, lambda: tensor.sum())


def _copies() -> float:
    copies = copies_for(CPU)
    source, target = copies.host_buffer(64 << 20), copies.device_buffer(64 << 20)

    def copy() -> None:
        copies.copy(0, target, source)
        copies.settle(0)

    return _rate(len(source), copy)


def _gemm() -> float:
    x, weight = torch.ones(_GEMM, _GEMM), torch.ones(_GEMM, _GEMM)
    return _rate(2 * _GEMM**3, lambda: product(x, weight, None))


def _rate(work: int, call: Callable[[], object]) -> float:
    """Return the best of several runs."""
    best = float("inf")
    for _ in range(5):
        begin_s = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin_s)
    return work / best
