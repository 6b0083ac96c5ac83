"""Laws that hold for many ops. Those of one op stand beside its record."""

from typing import Any

import torch
from torch import Tensor

from .case import Case
from .op import Function, Op, Property
from .trial import copied, leaves, map_leaves, same_bits


def call(op: Op, function: Function, case: Case, **replaced: Any) -> list[Tensor]:
    """The function's outputs on the case's inputs, some of them replaced."""
    return leaves(function(**copied({**op.inputs(case), **replaced})))


def assert_same_bits(one: list[Tensor], other: list[Tensor], property: str) -> None:
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert same_bits(a, b), f"{property}: output {index} differs\n{a}\n{b}"


def repeats_itself(op: Op, function: Function, case: Case) -> None:
    """Two calls on equal inputs give identical bits."""
    assert_same_bits(call(op, function, case), call(op, function, case), "run-to-run determinism")


def first_rows_alone(*names: str) -> Property:
    """The law that the first sequence of a batch does not depend on the others."""

    def batch_rows_independent(op: Op, function: Function, case: Case) -> None:
        """Replacing every sequence but the first leaves the first one's bits as they were."""
        inputs = op.inputs(case)
        replaced = {name: map_leaves(_keep_first_row, inputs[name]) for name in names}
        before, after = call(op, function, case), call(op, function, case, **replaced)
        assert_same_bits([out[:1] for out in before], [out[:1] for out in after], "batch rows independent")

    return batch_rows_independent


def _keep_first_row(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    noise = torch.flip(leaf, dims=[-1]) if leaf.ndim else leaf
    noise[:1] = leaf[:1]
    return noise
