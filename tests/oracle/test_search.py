"""Cases are drawn uniformly, and the one that fails is made as small as it can be."""

import pytest

from twinfer.oracle.case import Case
from twinfer.oracle.op import Op
from twinfer.oracle.search import drawn, smallest
from twinfer.oracle.table import OPS

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())


@ops
def test_seeds_hardly_ever_repeat(op: Op) -> None:
    """Of 200 cases, all have tensors of their own: drawn by Hypothesis, 40 to 72 of 200 had."""
    assert len({drawn(op, 0, number)[0].seed for number in range(200)}) >= 199


@ops
def test_a_case_is_built_again_from_its_indices(op: Op) -> None:
    """And the smallest of all that fail is the simplest case there is, if every case fails."""
    case, indices = drawn(op, 3, 7)
    assert smallest(op, indices, lambda case: False) == case
    simplest = smallest(op, [0] * 50, lambda case: False)
    assert smallest(op, indices, lambda case: True) == simplest


def test_what_a_failure_needs_is_kept_and_all_else_lowered() -> None:
    """Seven inputs and a bias are needed; the rest becomes one, none or the first kind."""

    def fails(case: Case) -> bool:
        return case.n.I >= 7 and bool(case.options["bias"])

    op = OPS["linear"]
    number = next(number for number in range(1000) if fails(drawn(op, 0, number)[0]))
    found = smallest(op, drawn(op, 0, number)[1], fails)
    assert dict(found.sizes) == {"B": 1, "T": 1, "I": 7, "N": 1}
    assert found.seed == 0
    assert found.options == {"bias": True, "weights": "float"}


@ops
def test_one_case_in_ten_is_larger(op: Op) -> None:
    """Where an op says which sizes are large; its own draws never reach these."""
    if op.larger is None:
        return
    cases = [drawn(op, 0, number)[0] for number in range(400)]
    largest = max(max(case.sizes.values()) for case in cases)
    assert largest >= 64
