"""Reads of a cache of experts, beside those of the best possible cache, which knows the future.

Only steps count, in which tokens choose one by one; a prompt reads what all its tokens chose, whatever is kept.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .uses import Expert

_LONGEST = 1 << 21
"""Experts of the longest trace that is kept for the bound."""


COUNTS = ("kept", "spare", "needed", "found", "read_bytes", "prompt_bytes", "guessed", "guessed_right")
"""The counts of a report that are shown."""


@dataclass(slots=True, kw_only=True)
class ExpertReport:
    """Counts since sequences were opened last."""

    kept: int = 0
    spare: int = 0
    """Slots that experts are read into, besides those that keep experts."""
    needed: int = 0
    """Experts that steps needed: those of a layer that several sequences chose together count once."""
    found: int = 0
    """Those of them that were there."""
    read_bytes: int = 0
    """Read for steps, wrong guesses included."""
    prompt_bytes: int = 0
    guessed: int = 0
    guessed_right: int = 0
    guessed_bytes: int = 0
    trace: list[Expert] = field(default_factory=list)
    sizes: dict[Expert, int] = field(default_factory=dict)

    def note_step(self, wanted: Sequence[Expert], found: Sequence[Expert], nbytes: Callable[[Expert], int]) -> None:
        """Note the experts that a layer of a step needs, and which of them were there."""
        self.needed += len(wanted)
        self.found += len(found)
        if len(self.trace) < _LONGEST:
            self.trace.extend(wanted)
            self.sizes.update((each, nbytes(each)) for each in wanted if each not in self.sizes)

    def note_guess(self, nbytes: int) -> None:
        self.guessed += 1
        self.guessed_bytes += nbytes
        self.read_bytes += nbytes

    @property
    def hit_rate(self) -> float | None:
        return self.found / self.needed if self.needed else None

    def bound_bytes(self) -> int:
        """Return the fewest bytes that a cache of this size can read for the steps so far, if it began empty."""
        return sum(self.sizes[self.trace[place]] for place in fewest(self.trace, self.kept))

    @property
    def line(self) -> str:
        """The counts of steps, in words."""
        return RankReport(counts=self.counts()).line

    def counts(self) -> list[int]:
        """Return what `RankReport` takes."""
        return [*(getattr(self, name) for name in COUNTS), self.bound_bytes()]

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the hit rate and the bound."""
        return RankReport(counts=self.counts()).as_json()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """The counts of a rank, or of several summed up, as they are sent: `COUNTS`, then the bytes of the bound."""

    counts: list[int]

    @classmethod
    def summed(cls, reports: Sequence["RankReport"]) -> "RankReport":
        """Return the counts of several ranks together."""
        return cls(counts=[sum(each) for each in zip(*(report.counts for report in reports), strict=True)])

    @property
    def hit_rate(self) -> float | None:
        needed, found = (self.counts[COUNTS.index(name)] for name in ("needed", "found"))
        return found / needed if needed else None

    @property
    def line(self) -> str:
        """The counts of steps, in words."""
        read, prompts = (self.counts[COUNTS.index(name)] for name in ("read_bytes", "prompt_bytes"))
        if self.hit_rate is None:
            return f"experts: {prompts:,} bytes read for prompts"
        return (
            f"experts: {self.hit_rate:.1%} of those that steps needed were in memory, {read:,} bytes were "
            f"read for them (at best {self.counts[-1]:,}, from an empty cache), {prompts:,} for prompts"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the hit rate and the bound."""
        *counts, bound = self.counts
        return {**dict(zip(COUNTS, counts, strict=True)), "hit_rate": self.hit_rate, "bound_bytes": bound}


@dataclass(frozen=True, slots=True)
class RankReports:
    """The counts of all ranks of a job."""

    ranks: list[RankReport]

    @property
    def line(self) -> str:
        """The counts of steps, in words: those of all ranks together, then hits and bytes of each."""
        each = (
            f"rank {rank} {report.hit_rate or 0.0:.1%}, {report.counts[COUNTS.index('read_bytes')]:,} bytes"
            for rank, report in enumerate(self.ranks)
        )
        return f"{RankReport.summed(self.ranks).line}; {'; '.join(each)}"

    def as_json(self) -> dict[str, Any]:
        """Return the counts summed up, and those of each rank."""
        return {**RankReport.summed(self.ranks).as_json(), "ranks": [report.as_json() for report in self.ranks]}


def fewest(trace: Sequence[Expert], capacity: int) -> list[int]:
    """Return the places of a trace where a cache that knows the future fetches an expert.

    It gives up what is needed again last, and that may be what it has just fetched: so no cache fetches fewer.

    >>> fewest([(0, 0), (0, 1), (0, 2), (0, 0), (0, 1)], 2)
    [0, 1, 2]
    """
    after: list[int] = []
    next_use: dict[Expert, int] = {}
    for place in reversed(range(len(trace))):
        after.append(next_use.get(trace[place], len(trace)))
        next_use[trace[place]] = place
    after.reverse()
    held: dict[Expert, int] = {}
    last_needed: list[tuple[int, Expert]] = []
    fetched = []
    for place, expert in enumerate(trace):
        if expert not in held:
            fetched.append(place)
        held[expert] = after[place]
        heapq.heappush(last_needed, (-after[place], expert))
        while len(held) > capacity:
            place_of, gone = heapq.heappop(last_needed)
            if held.get(gone) == -place_of:
                del held[gone]
    return fetched
