"""What this machine's disk and processor do now, and what a plan's steps will take by it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..compiled.linear import product
from ..spec.config import ModelConfig
from ..spec.counts import total
from .direct import DirectFile, aligned_buffer
from .plan import PREFILL_TOKENS, Plan
from .store import Store
from .streamer import Streamer

_ENOUGH_S = 1.0
_GEMM = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """Bytes and operations a second."""

    disk: float
    """Bytes a second, read directly, as the streamer reads."""
    memory: float
    """Bytes a second, read by one sum."""
    gemm: float
    """Float operations a second of a product of many rows."""
    direct: bool
    """Whether the page cache was passed by."""


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
        return Speeds(disk=_disk(store, file), memory=_memory(), gemm=_gemm(), direct=file.direct)
    finally:
        file.close()


def predict(plan: Plan, config: ModelConfig, speeds: Speeds) -> Prediction:
    """Say what a step takes: reading and computing go on at once, so the longer of the two.

    A decode step reads each pass's weights from memory; a prompt is bound by its products.
    """
    fetch_s = plan.step_bytes / speeds.disk
    weights = total(config).matrix
    passes = -(-plan.batch // 4)
    step_s = max(fetch_s, passes * plan.step_bytes / speeds.memory, 2 * weights * plan.batch / speeds.gemm)
    tokens = plan.batch * min(plan.reserve, PREFILL_TOKENS)
    prompt_s = max(fetch_s, 2 * weights * tokens / speeds.gemm)
    return Prediction(
        step_s=step_s,
        token_s=step_s / plan.batch,
        prompt_token_s=prompt_s / tokens,
        hiding_tokens=speeds.gemm / speeds.disk * plan.step_bytes / weights / 2,
    )


def _disk(store: Store, file: DirectFile) -> float:
    """Sweep over the store without computing, for about a second."""
    streamer = Streamer(file, store.schedule, 2)
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
