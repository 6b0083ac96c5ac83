"""Schedules of an inference pipeline: which stage works on which micro-batch in which slot (paper, section IV-B and C).

P stages hold consecutive layers. A batch is divided into M micro-batches, which pass the stages one after the other, a
stage working on one at a time. T tokens are generated; token t + 1 of a micro-batch can enter stage 0 only when token t
has left the last stage, since it is computed from it. With P = M = 4, micro-batches a to d, two tokens:

    baseline         each token waits until the whole batch has its token before: T * (M + P - 1) slots
    dynamic queue    a micro-batch that leaves the last stage enters stage 0 again at once: T * M + P - 1, where M >= P

    >>> from twinfer.reference.parallel.timeline import picture
    >>> print(picture(baseline(4, 4, 2)))
    stage 0  a0 b0 c0 d0 .  .  .  a1 b1 c1 d1 .  .  .
    stage 1  .  a0 b0 c0 d0 .  .  .  a1 b1 c1 d1 .  .
    stage 2  .  .  a0 b0 c0 d0 .  .  .  a1 b1 c1 d1 .
    stage 3  .  .  .  a0 b0 c0 d0 .  .  .  a1 b1 c1 d1
    >>> print(picture(dynamic_queue(4, 4, 2)))
    stage 0  a0 b0 c0 d0 a1 b1 c1 d1 .  .  .
    stage 1  .  a0 b0 c0 d0 a1 b1 c1 d1 .  .
    stage 2  .  .  a0 b0 c0 d0 a1 b1 c1 d1 .
    stage 3  .  .  .  a0 b0 c0 d0 a1 b1 c1 d1

Fewer than P micro-batches leave stages idle: (T - 1) * P + M + P - 1 slots. Slots are equally long only as long as all
micro-batches cost the same. They do not (`hybrid`), so `timeline.makespan` measures schedules in time.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from ...spec.errors import RequestError


class Event(NamedTuple):
    """One micro-batch on one stage, for one token; token 0 is the prompt, which yields the first."""

    slot: int
    stage: int
    micro_batch: int
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    stages: int
    tokens: int
    prompt_batches: int
    """Micro-batches that the batch is divided into for token 0."""
    generation_batches: int
    """The same for all tokens after it; a divisor of `prompt_batches`, whose neighbors are merged."""
    events: tuple[Event, ...]
    """In the order of slots, then stages."""

    @property
    def slots(self) -> int:
        return 1 + max(event.slot for event in self.events)

    @property
    def bubble_fraction(self) -> float:
        """The share of slots in which a stage has nothing to do: (P - 1) / slots where all stages do equally much."""
        return 1 - len(self.events) / (self.stages * self.slots)

    def batches(self, token: int) -> int:
        """Return how many micro-batches there are of a token."""
        return self.generation_batches if token else self.prompt_batches

    def awaited(self, micro_batch: int, token: int) -> range:
        """Return the micro-batches of the token before that must have left the last stage: one, or those merged.

        >>> hybrid(2, 4, 2, 3).awaited(1, 1), hybrid(2, 4, 2, 3).awaited(1, 2)
        (range(2, 4), range(1, 2))
        """
        if token == 0:
            return range(0)
        merged = self.batches(token - 1) // self.batches(token)
        return range(micro_batch * merged, (micro_batch + 1) * merged)


def baseline(stages: int, micro_batches: int, tokens: int) -> Schedule:
    """Pass the batch once for each token; a token begins when the one before has left the last stage altogether."""
    _check(stages, micro_batches, micro_batches, tokens)
    period = micro_batches + stages - 1
    events = (
        Event(token * period + micro_batch + stage, stage, micro_batch, token)
        for token in range(tokens)
        for micro_batch in range(micro_batches)
        for stage in range(stages)
    )
    return _schedule(stages, micro_batches, micro_batches, tokens, list(events))


def dynamic_queue(stages: int, micro_batches: int, tokens: int) -> Schedule:
    """Queue a micro-batch for stage 0 again as soon as it leaves the last stage."""
    return hybrid(stages, micro_batches, micro_batches, tokens)


def hybrid(stages: int, prompt_batches: int, generation_batches: int, tokens: int) -> Schedule:
    """The dynamic queue with more micro-batches for the prompt than for the tokens after it.

    A prompt waits for multiplications: smaller micro-batches cost less each, and fill the pipeline sooner. Generating a
    token waits for the weights, which costs the same however small the micro-batch is, so there should be no more than
    keep all stages busy. Between the two, neighbors are merged: 4 micro-batches a to d become 2, a and b.

    >>> from twinfer.reference.parallel.timeline import picture
    >>> print(picture(hybrid(2, 4, 2, 2)))
    stage 0  a0 b0 c0 d0 a1 b1 .
    stage 1  .  a0 b0 c0 d0 a1 b1
    """
    _check(stages, prompt_batches, generation_batches, tokens)
    merged = prompt_batches // generation_batches
    waiting = deque((micro_batch, 0) for micro_batch in range(prompt_batches))
    pipe: list[tuple[int, int] | None] = [None] * stages
    events: list[Event] = []
    slot = 0
    while waiting or any(pipe[:-1]):
        pipe = [waiting.popleft() if waiting else None, *pipe[:-1]]
        events += (Event(slot, stage, *work) for stage, work in enumerate(pipe) if work is not None)
        slot += 1
        if pipe[-1] is not None:
            micro_batch, token = pipe[-1]
            whole = token > 0 or (micro_batch + 1) % merged == 0  # the last of those that are merged
            if whole and token + 1 < tokens:
                waiting.append((micro_batch if token else micro_batch // merged, token + 1))
    return _schedule(stages, prompt_batches, generation_batches, tokens, events)


def _schedule(stages: int, prompt: int, generation: int, tokens: int, events: list[Event]) -> Schedule:
    return Schedule(
        stages=stages,
        tokens=tokens,
        prompt_batches=prompt,
        generation_batches=generation,
        events=tuple(sorted(events)),
    )


def _check(stages: int, prompt_batches: int, generation_batches: int, tokens: int) -> None:
    sizes = {"stages": stages, "prompt_batches": prompt_batches, "tokens": tokens}
    for name, value in {**sizes, "generation_batches": generation_batches}.items():
        if value < 1:
            raise RequestError(f"{name} is {value}; it must be at least 1")
    if prompt_batches % generation_batches:
        raise RequestError(
            f"generation_batches is {generation_batches}; neighbors are merged, so it must divide prompt_batches, "
            f"which is {prompt_batches}"
        )
