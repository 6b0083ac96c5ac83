"""Timing several things fairly: in turn, often, and never while something compiles.

Machines drift, so what counts is the ratio of two times of the same round: every round takes one sample of each thing.
The timed region runs under `fail_on_recompile`, so a program that compiles again while it is timed fails by name
instead of reporting its compiler's time as its own.
"""

import math
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from .reasons import reason

Name = TypeVar("Name", bound=Hashable)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How to take a sample of one thing."""

    take: Callable[[], float]
    """Returns the seconds of a call, or of whatever a ratio is to be about."""
    calls: int = 1
    """Calls that the sample averages."""


def interleave(
    samples: Mapping[Name, Sample],
    rounds: int,
    *,
    pause_s: float = 0.0,
    may_fail: Collection[Name] = (),
    report: Callable[[str], None] = lambda line: None,
) -> dict[Name, Timing]:
    """Take every sample once uncounted, when things may still compile, then `rounds` times, all in turn.

    What compiles in a counted round drops out and gets an error instead of times. So does anything in `may_fail`,
    whatever it raises; of the others it is raised. Enter `torch.no_grad()` and the like around compiling and timing
    alike, for a change between them is a recompile.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in samples}
    errors: dict[Name, str] = {}

    def take_all() -> Iterator[tuple[Name, float]]:
        for name, sample in samples.items():
            if name in errors:
                continue
            time.sleep(pause_s)
            try:
                taken = sample.take()
            except Exception as error:
                if isinstance(error, RuntimeError) and _RECOMPILED in str(error):
                    errors[name] = f"{name} recompiled while it was timed: {' '.join(str(error).split())}"
                elif name in may_fail:
                    errors[name] = reason(error)
                else:
                    raise
                continue
            yield name, taken

    report("warming up, which is not counted")
    for _ in take_all():
        pass
    with torch.compiler.set_stance("fail_on_recompile"):
        for turn in range(1, rounds + 1):
            report(f"round {turn} of {rounds}")
            for name, taken in take_all():
                seconds[name].append(taken)
    return {
        name: Timing(seconds=() if name in errors else tuple(seconds[name]), calls=sample.calls, error=errors.get(name))
        for name, sample in samples.items()
    }


def sample_of(call: Callable[[], object], device: torch.device | str = "cpu") -> Sample:
    """Return a sample of as many calls as take `LEAST_SAMPLE_S`, found by calling: the first call may still compile."""
    on_gpu = torch.device(device).type == "cuda"
    calls = _calls_of_a_sample(call, on_gpu)
    return Sample(take=lambda: _seconds(call, calls, on_gpu) / calls, calls=calls)


def _calls_of_a_sample(candidate: Callable[[], object], on_gpu: bool) -> int:
    """Return how many calls take `LEAST_SAMPLE_S`, found by doubling."""
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
