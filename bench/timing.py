"""Timing several callables fairly: in turn, often, and never while something compiles.

Machines drift, so what counts is the ratio of two times of the same round: every round times each callable once. The
timed region runs under `fail_on_recompile`, so a program that compiles again while it is timed fails by name instead of
reporting its compiler's time as its own.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

LEAST_SAMPLE_S = 2e-3
"""A sample is one call, or as many as take this long: clocks and the loop around a call are thousands of times less."""
_RECOMPILED = "Detected recompile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one callable took."""

    seconds: tuple[float, ...]
    """Seconds a call, one figure a round. Empty where there is an error."""
    calls: int
    """Calls in each sample."""
    error: str | None = None

    def quantile(self, share: float) -> float | None:
        return quantile(self.seconds, share) if self.seconds else None


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share lies, interpolated between neighbors.

    >>> quantile([1.0, 2.0, 4.0], 0.5), quantile([1.0, 2.0, 4.0], 0.75)
    (2.0, 3.0)
    """
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = math.floor(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios: that of a half and a double is 1.

    >>> geometric_mean([0.5, 2.0])
    1.0
    """
    return math.exp(sum(math.log(value) for value in values) / len(values))


def paired_ratios(baseline: Timing, other: Timing) -> list[float]:
    """How many times faster than the baseline, round by round."""
    return [base / own for base, own in zip(baseline.seconds, other.seconds, strict=True)]


def interleave(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu"
) -> dict[str, Timing]:
    """Time each candidate `rounds` times, all in turn, after a warm-up in which they may still compile.

    One that compiles while it is timed gets a `Timing` with an error and drops out; other exceptions are raised. Enter
    `torch.no_grad()` and the like around compiling and timing alike, for a change between them is a recompile.
    """
    on_gpu = torch.device(device).type == "cuda"
    calls = {name: _calls_of_a_sample(candidate, on_gpu) for name, candidate in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    errors: dict[str, str] = {}
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(rounds):
            for name, candidate in candidates.items():
                if name in errors:
                    continue
                try:
                    seconds[name].append(_seconds(candidate, calls[name], on_gpu) / calls[name])
                except RuntimeError as error:
                    if _RECOMPILED not in str(error):
                        raise
                    errors[name] = f"{name} recompiled while it was timed: {' '.join(str(error).split())}"
    return {
        name: Timing(seconds=() if name in errors else tuple(seconds[name]), calls=calls[name], error=errors.get(name))
        for name in candidates
    }


def _calls_of_a_sample(candidate: Callable[[], object], on_gpu: bool) -> int:
    """As many calls as take `LEAST_SAMPLE_S`, found by doubling; this is the warm-up too."""
    candidate()
    calls = 1
    while True:
        taken = _seconds(candidate, calls, on_gpu)
        if taken >= LEAST_SAMPLE_S:
            return calls
        calls = min(2 * calls, math.ceil(calls * LEAST_SAMPLE_S / taken)) if taken > 0 else 2 * calls


def _seconds(candidate: Callable[[], object], calls: int, on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
