"""The search for a failing case: cases drawn uniformly from a seed, and the first that fails made smaller.

Every choice a case is built from is an index, and the first option is the simplest. So a case is a list of indices, and
a smaller case is the same list with some of them lowered, built anew.
"""

import random
from collections.abc import Callable, Sequence

from .case import Case, Choice
from .op import Op

_UNORDERED = 1000
"""Choices among more options are seeds: of these only the first few are tried."""


class Choices:
    """A picker that notes which option it took: at random, or as a list says (the simplest where that ends)."""

    def __init__(self, source: random.Random | Sequence[int]) -> None:
        self._source = source
        self.taken: list[int] = []

    def integer(self, low: int, high: int) -> int:
        return low + self._index(high - low + 1)

    def choice(self, options: Sequence[Choice]) -> Choice:
        return options[self._index(len(options))]

    def _index(self, count: int) -> int:
        if isinstance(self._source, random.Random):
            index = self._source.randrange(count)
        else:
            asked = len(self.taken)
            index = min(self._source[asked], count - 1) if asked < len(self._source) else 0
        self.taken.append(index)
        return index


def drawn(op: Op, seed: int, number: int) -> tuple[Case, list[int]]:
    """The case of that number under a seed, and the indices that build it again."""
    picker = Choices(random.Random(f"{op.name} {seed} {number}"))
    case = op.draw(picker)
    return case, picker.taken


def smallest(op: Op, indices: Sequence[int], fails: Callable[[Case], bool], *, tries: int = 600) -> Case:
    """Lower one index after the other as long as the case still fails; at most so many tries."""
    kept, best = list(indices), op.draw(Choices(indices))
    left = tries
    lowered = True
    while lowered and left > 0:
        lowered = False
        position = 0
        while position < len(kept):
            for index in _lower(kept[position]):
                if left == 0:
                    return best
                left -= 1
                picker = Choices([*kept[:position], index, *kept[position + 1 :]])
                case = op.draw(picker)
                if picker.taken < kept and fails(case):
                    kept, best, lowered = picker.taken, case, True
                    break
            position += 1
    return best


def _lower(index: int) -> list[int]:
    """Lower indices to try, the lowest first."""
    if index > _UNORDERED:
        return [0, 1, 2]
    return sorted({0, index // 2, index - 1} - {index}) if index else []
