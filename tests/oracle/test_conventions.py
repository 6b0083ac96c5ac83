"""Conventions where public code differs from the reference, and what no convention excuses."""

from functools import partial
from typing import Any

import pytest
import torch

from twinfer.oracle.case import Inputs
from twinfer.oracle.op import Function
from twinfer.oracle.search import drawn
from twinfer.oracle.table import OPS

ROTATING = ("rotate", "self_attention", "layer")


def share_that_fails(op_name: str, function: Function, *options: str, cases: int = 60) -> float:
    op = OPS[op_name].under(*options)
    return (
        sum(op.guarantee.judge(op.trial(function, drawn(op, 0, number)[0])).failed for number in range(cases)) / cases
    )


def furthest_position(inputs: Inputs) -> int:
    """The position of the last token after what the cache holds."""
    return int(inputs["cache"].length + inputs["x_BTM"].shape[1]) - 1


@pytest.mark.parametrize("op", ROTATING)
def test_float32_angles_hold_under_the_option(op: str) -> None:
    """Of every op that rotates; without it `rotate` fails, and the others at far positions only."""
    record, rounded = OPS[op], OPS[op].under("angles=float32").reference
    assert share_that_fails(op, rounded, "angles=float32") == 0
    cases = [drawn(record, 0, number)[0] for number in range(60)]
    failing = [case for case in cases if record.guarantee.judge(record.trial(rounded, case)).failed]
    if op == "rotate":
        assert failing
    else:
        assert all(furthest_position(record.inputs(case)) >= 256 for case in failing), failing


@pytest.mark.parametrize("op", ["next_token", "draw", "sample"])
def test_who_chooses_a_token_from_nan_is_told(op: str) -> None:
    """A candidate that takes the largest of logits or probabilities, NaN or not, breaks a property."""
    record = OPS[op]
    law = next(each for each in record.properties if each.__name__ == "refuses_what_is_no_number")
    case, _ = drawn(record, 0, 0)

    def largest(**given: Any) -> int:
        return int(next(iter(given.values())).argmax())

    law(record, record.reference, case)
    with pytest.raises(AssertionError, match="is NaN, and token"):
        law(record, largest, case)


def test_a_bias_may_be_added_to_a_stored_product_but_not_be_rounded_more() -> None:
    """torch's 16-bit products round before they add a bias; a product in 8 bits of mantissa fewer is wrong."""

    def stored_before(bits: int, *, x: Any, weights: Any) -> Any:
        product = x.float() @ weights.weight_NI.float().T
        product = (product.double() * 2**bits + product.double() - product.double() * 2**bits).to(x.dtype)
        return product if weights.bias_N is None else product + weights.bias_N

    assert share_that_fails("linear", partial(stored_before, 0), cases=200) == 0
    assert share_that_fails("linear", partial(stored_before, 46), cases=200) > 0.1
    assert torch.get_default_dtype() is torch.float32
