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
        if self.hit_rate is None:
            return f"experts: {self.prompt_bytes:,} bytes read for prompts"
        return (
            f"experts: {self.hit_rate:.1%} of those that steps needed were in memory, {self.read_bytes:,} bytes were "
            f"read for them (at best {self.bound_bytes():,}, from an empty cache), {self.prompt_bytes:,} for prompts"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the counts, the hit rate and the bound."""
        names = ("kept", "spare", "needed", "found", "read_bytes", "prompt_bytes", "guessed", "guessed_right")
        counts = {name: getattr(self, name) for name in names}
        return {**counts, "hit_rate": self.hit_rate, "bound_bytes": self.bound_bytes()}


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
