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
from .reasons import reason
from .timing import Timing

PAUSE_S = 0.25
_RECOMPILED = "Detected recompile"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How to take one."""

    take: Callable[[], float]
    """Returns seconds, of `tokens` tokens (or rows, or whatever a ratio is to be about)."""
    tokens: int = 1


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


def sample(candidate: Candidate, prompt_T: Tensor, workload: Workload) -> Sample:
    """Of a model at work."""
    timed = candidate.seconds if isinstance(candidate, TimesItself) else functools.partial(seconds_of, candidate)
    return Sample(take=lambda: timed(prompt_T, workload), tokens=workload.tokens)


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


def interleave(
    samples: Mapping[Key, Sample],
    rounds: int,
    *,
    may_fail: Collection[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> dict[Key, Measured]:
    """Take every sample once uncounted, when things may still compile, then `rounds` times, all in turn.

    Whoever compiles in a counted round gets an error in place of times. So do those in `may_fail`, by name, for
    anything that they raise; of others it is raised.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in samples}
    errors: dict[Key, str] = {}

    def take_all(counted: bool) -> None:
        for key, each in samples.items():
            if key in errors:
                continue
            time.sleep(PAUSE_S)
            try:
                taken = each.take()
            except Exception as error:
                recompiled = isinstance(error, RuntimeError) and _RECOMPILED in str(error)
                if not recompiled and key.who not in may_fail:
                    raise
                errors[key] = reason(error)
                continue
            if counted:
                seconds[key].append(taken)

    report("warming up, which is not counted")
    take_all(counted=False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for turn in range(1, rounds + 1):
            report(f"round {turn} of {rounds}")
            take_all(counted=True)
    return {
        key: Measured(
            timing=Timing(seconds=() if key in errors else tuple(seconds[key]), calls=1, error=errors.get(key)),
            tokens=samples[key].tokens,
        )
        for key in samples
    }
