"""Conventions where public code differs from the reference, and what no convention excuses."""

from contextlib import nullcontext
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


NAN_LAWS = ("hides_no_nan", "refuses_what_is_no_number", "nan_shows", "nan_stays")


def raising(error: Exception, *, always: bool) -> Any:
    """An implementation that raises for a NaN, or always, and otherwise is the reference."""

    def made(reference: Any) -> Any:
        def raises(**given: Any) -> Any:
            tensors = [each for each in given.values() if isinstance(each, torch.Tensor)]
            if always or any(each.is_floating_point() and bool(each.isnan().any()) for each in tensors):
                raise error
            return reference(**given)

        return raises

    return made


REFUSALS: dict[str, tuple[Any, str | None]] = {
    "a kind for bad values": (raising(ValueError("the largest logit is nan"), always=False), None),
    "torch's own for NaN": (raising(RuntimeError("tensor contains either `inf`, `nan`"), always=False), None),
    "always": (raising(ValueError("no"), always=True), "ValueError is raised without a NaN in"),
    "another kind": (raising(TypeError("takes 2 arguments"), always=False), r"raises TypeError \(takes 2 arguments\)"),
    "for another reason": (
        raising(RuntimeError("out of memory"), always=False),
        r"raises RuntimeError \(out of memory",
    ),
}


@pytest.mark.parametrize("refusal", list(REFUSALS))
@pytest.mark.parametrize(
    "op", [op.name for op in OPS.values() if any(law.__name__ in NAN_LAWS for law in op.properties)]
)
def test_only_an_error_about_nan_is_a_refusal(op: str, refusal: str) -> None:
    """Of every op with such a property: who always raises, or raises something else, breaks it."""
    record, (made, complaint) = OPS[op], REFUSALS[refusal]
    law = next(each for each in record.properties if each.__name__ in NAN_LAWS)
    case, _ = drawn(record, 0, 0)
    with nullcontext() if complaint is None else pytest.raises(AssertionError, match=complaint):
        law(record, made(record.reference), case)
