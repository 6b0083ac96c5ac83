"""Whole models timed in turn: what is run, and its seconds round by round.

Machines drift, so what counts is the ratio of two times of the same round: every round takes one sample of everything,
in turn. Between two samples there is a pause, for the threads of some libraries spin for up to 0.2 s when their work is
done, and would take the processor from the next. After it a candidate's own threads sleep, so what is timed is never
the first that it does: steps follow their prompt, and a prompt is read twice.

Shapes: T prompt tokens.
"""

import functools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .candidates import Candidate
from .timing import Sample, Timing, interleave

PAUSE_S = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A prompt read, or the steps after it, in one sequence or several alike."""

    prompt: int
    steps: int = 0
    """Timed after the prompt, one token for each sequence at a time. With none, the prompt itself is timed."""
    batch: int = 1

    @property
    def title(self) -> str:
        """
        >>> Workload(prompt=512).title, Workload(prompt=32, steps=24, batch=8).title
        ('prefill 512', 'decode batch 8')
        """
        return f"decode batch {self.batch}" if self.steps else f"prefill {self.prompt}"

    @property
    def tokens(self) -> int:
        """What a sample's seconds are for: a token of every sequence, or the prompt."""
        return self.batch if self.steps else self.prompt

    @property
    def shape(self) -> dict[str, int]:
        """As rows have it."""
        return {"prompt": self.prompt, "batch": self.batch, "steps": self.steps}


@dataclass(frozen=True, slots=True)
class Key:
    """What was measured: of whom, and what."""

    who: str
    what: str

    def __str__(self) -> str:
        return f"{self.who}, {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSample(Sample):
    """How to take a sample of a model at work, or of what its speed is compared with."""

    tokens: int = 1
    """Tokens (or rows, or whatever a ratio is to be about) that the seconds are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of it."""

    timing: Timing
    tokens: int = 1

    @property
    def rates(self) -> list[float]:
        """Tokens a second, round by round."""
        return [self.tokens / seconds for seconds in self.timing.seconds]


@runtime_checkable
class TimesItself(Protocol):
    """A candidate in another process, where it is timed too."""

    def seconds(self, prompt_T: Tensor, workload: Workload) -> float: ...


def sample(candidate: Candidate, prompt_T: Tensor, workload: Workload) -> ModelSample:
    """Of a model at work."""
    timed = candidate.seconds if isinstance(candidate, TimesItself) else functools.partial(seconds_of, candidate)
    return ModelSample(take=lambda: timed(prompt_T, workload), tokens=workload.tokens)


def seconds_of(candidate: Candidate, prompt_T: Tensor, workload: Workload) -> float:
    """Of one step, on average, or of the prompt, which has been read once before."""
    if not workload.steps:
        next(candidate.answer(prompt_T, 1, workload.batch))
    answer = candidate.answer(prompt_T, 1 + workload.steps, workload.batch)
    start = time.perf_counter()
    next(answer)
    if workload.steps:
        start = time.perf_counter()
        for _ in answer:
            pass
    return (time.perf_counter() - start) / max(1, workload.steps)


def prompt(vocabulary: int, length: int) -> Tensor:
    """Ids drawn once and for all; a shorter prompt is the beginning of a longer one."""
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))


def greedy(candidate: Candidate, prompt_T: Tensor, new: int) -> list[int]:
    """The first tokens of one sequence."""
    return [tokens[0] for tokens in candidate.answer(prompt_T, new)]


def measure_in_turn(
    samples: Mapping[Key, ModelSample],
    rounds: int,
    *,
    may_fail: Collection[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> dict[Key, Measured]:
    """Take all samples in turn, as `interleave` does, with pauses between; whoever is in `may_fail` may fail."""
    timings = interleave(
        samples, rounds, pause_s=PAUSE_S, may_fail={key for key in samples if key.who in may_fail}, report=report
    )
    return {key: Measured(timing=timing, tokens=samples[key].tokens) for key, timing in timings.items()}
