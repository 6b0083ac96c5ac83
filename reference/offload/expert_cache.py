"""Which experts to keep: what policies would have fetched over a trace of chosen experts.

A trace is the experts in the order in which they are needed, as (layer, expert). A cache holds `capacity` of them; an
expert that it lacks is fetched, and one it holds then has to go. Policies differ in which:

    least recently used      the one whose last use is longest ago
    least frequently used    the one used least often so far; of equals the least recently used
    optimal                  the one whose next use is farthest ahead (Belady 1966)

No policy fetches fewer than the last, which knows the future: it is a bound, not a choice.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

Trace = Sequence[Hashable]

Policy = Callable[[Trace, int, set[Hashable]], Hashable]
"""Takes the trace, the place of the expert that is needed now, and what is held; returns what goes."""


def fetches(trace: Trace, capacity: int, policy: Policy) -> list[int]:
    """Return the places of the trace where an expert has to be fetched.

    >>> fetches("abcab", 2, least_recently_used), fetches("abcab", 2, optimal)
    ([0, 1, 2, 3, 4], [0, 1, 2, 4])
    """
    held: set[Hashable] = set()
    fetched = []
    for place, expert in enumerate(trace):
        if expert in held:
            continue
        fetched.append(place)
        if len(held) == capacity:
            held.remove(policy(trace, place, held))
        held.add(expert)
    return fetched


def hit_rate(trace: Trace, capacity: int, policy: Policy) -> float:
    """Return the share of the trace that is held when it is needed."""
    return 1 - len(fetches(trace, capacity, policy)) / len(trace)


def least_recently_used(trace: Trace, place: int, held: set[Hashable]) -> Hashable:
    """Return the expert whose last use is longest ago."""
    return min(held, key=lambda expert: _last_use(trace, place, expert))


def least_frequently_used(trace: Trace, place: int, held: set[Hashable]) -> Hashable:
    """Return the expert that was used least often so far; of equals the least recently used."""
    uses = Counter(trace[:place])
    return min(held, key=lambda expert: (uses[expert], _last_use(trace, place, expert)))


def optimal(trace: Trace, place: int, held: set[Hashable]) -> Hashable:
    """Return the expert that is needed again last, or never."""
    return max(held, key=lambda expert: _next_use(trace, place, expert))


def _last_use(trace: Trace, place: int, expert: Hashable) -> int:
    return max(each for each in range(place) if trace[each] == expert)


def _next_use(trace: Trace, place: int, expert: Hashable) -> int:
    return next((each for each in range(place, len(trace)) if trace[each] == expert), len(trace))
