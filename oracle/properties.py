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


def with_nan(op: Op, function: Function, case: Case, name: str, spoiled: Tensor) -> Any:
    """Return what the function makes of the case's inputs with a NaN in one of them; None where it refuses that.

    A refusal is a `ValueError`, which `NumericsError` is, an `ArithmeticError`, or a `RuntimeError` that names NaN, as
    torch raises. Any other error is none, and who raises without the NaN too refuses nothing: `AssertionError`.
    """
    try:
        function(**copied(op.inputs(case)))
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} is raised without a NaN in {name} too: {error}") from error
    try:
        return function(**copied({**op.inputs(case), name: spoiled}))
    except Exception as error:
        if isinstance(error, ValueError | ArithmeticError) or _names_nan(error):
            return None
        raise AssertionError(
            f"a NaN in {name} raises {type(error).__name__} ({error}); a refusal is a ValueError or an ArithmeticError"
        ) from error


def _names_nan(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "nan" in str(error).lower()


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
