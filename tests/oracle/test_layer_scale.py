"""Values that pass through a layer together with their scales, by the reference's own layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.oracle.op import Op
from twinfer.oracle.ops.layer import LAYER, SELF_ATTENTION
from twinfer.oracle.ops.layer_scale import join, known_after, split
from twinfer.oracle.strategies import cases
from twinfer.oracle.trial import same_bits
from twinfer.reference.layer import layer, self_attention

OPS: list[tuple[Op, Callable[..., Any]]] = [(SELF_ATTENTION, self_attention), (LAYER, layer)]


@pytest.mark.parametrize(("op", "function"), OPS, ids=["self_attention", "layer"])
@given(data=st.data())
def test_values_are_the_references_and_within_their_scales(
    op: Op, function: Callable[..., Any], data: st.DataObject
) -> None:
    """Every value is, bit by bit, what the reference computes; and at most as large as its scale, to rounding."""
    trial = op.trial(op.reference, data.draw(cases(op)))
    for (value, scale), right in zip(known_after(function, trial.exact_inputs), trial.truth, strict=True):
        assert same_bits(value, right)
        assert bool((value.abs() <= scale * (1 + 1e-12)).all())  # of scales of at most some hundred operations each


def test_a_clipped_value_keeps_its_scale() -> None:
    """However narrow the clip: the error of a value that is not clipped is as large as before."""
    value, scale = split(join(torch.tensor([[0.5, 3.0]]), torch.tensor([[40.0, 3.0]])).clamp(-1.0, 1.0))
    assert (value.tolist(), scale.tolist()) == ([[0.5, 1.0]], [[40.0, 3.0]])
