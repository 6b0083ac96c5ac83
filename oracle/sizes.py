"""Sizes around the borders where implementations change: vectors, tiles, passes, groups of a quantized row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .case import Case, Picker

Sizes = dict[str, int]

BATCH = (4, 5)
TOKENS = (15, 16, 17, 33, 63, 64, 65, 127, 128, 129)
HEAD_SIZE = (64, 80, 96, 128, 136, 192, 256)
HIDDEN = (63, 64, 65, 127, 128, 129, 256, 320, 1000, 1023, 1024)
INPUTS = (*HIDDEN, 2048, 4095, 4096)
OUTPUTS = (15, 16, 17, 31, 32, 33, 63, 64, 65, 129)
VOCABULARY = (128, 1000, 1001, 1024, 4097)
FAR_KEYS = {"S": (257, 513, 1025)}
"""Keys of a long text, where a few queries look at them: a mask of both would cost more than it shows."""
FAR = {
    **dict.fromkeys("TSP", (257, 513)),
    **dict.fromkeys("MF", (1025, 2049)),
    **dict.fromkeys("IK", (4097, 8200)),
    **dict.fromkeys("N", (257, 1025)),
    "V": (8193, 33_000),
}
"""Sizes of a real model, by axis: past the borders of tables, of words of an index, and of long splits."""


def as_they_are(before: Sizes, after: Sizes) -> Sizes:
    """No size depends on another."""
    return after


def keys_cover_queries(before: Sizes, after: Sizes) -> Sizes:
    """The queries are the last of the keys, so there are at least as many keys."""
    return {**after, "S": max(after["S"], after["T"])}


def resized(
    pools: Mapping[str, Sequence[int]],
    fit: Callable[[Sizes, Sizes], Sizes] = as_they_are,
    far: Mapping[str, Sequence[int]] | None = None,
) -> Callable[[Case, Picker], Case]:
    """Give one or two axes a size from their pools; `fit` makes the others agree, from the sizes before and after.

    In one case of three a single axis gets a size from `far` instead (by default that of `FAR`), the others staying
    small.
    """
    reaches = {axis: FAR[axis] for axis in pools if axis in FAR} if far is None else far

    def larger(case: Case, pick: Picker) -> Case:
        sizes = dict(case.sizes)
        if reaches and pick.integer(0, 2) == 2:
            axis = pick.choice(tuple(reaches))
            sizes[axis] = pick.choice(reaches[axis])
            return replace(case, sizes=fit(dict(case.sizes), sizes))
        for _ in range(pick.integer(1, 2)):
            axis = pick.choice(tuple(pools))
            sizes[axis] = pick.choice(pools[axis])
        return replace(case, sizes=fit(dict(case.sizes), sizes))

    return larger
