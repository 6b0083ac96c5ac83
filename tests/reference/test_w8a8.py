"""The product of 8-bit integers, by hand and at its limits."""

import pytest
import torch

from twinfer.reference.quantize import RowQuantized, quantize_rows
from twinfer.reference.w8a8 import MOST_INPUTS, integer_product, linear_w8a8
from twinfer.spec.errors import RequestError


def test_a_product_by_hand() -> None:
    """Codes (127, -2, 4) at scale 2 and (1, 10, 0) at scale 1/2: 107 * 2 / 2 + 1; the row of zeros gives the bias."""
    x = torch.tensor([[254.0, -5.0, 7.5], [0.0, 0.0, 0.0]])
    weights = RowQuantized(torch.tensor([[1, 10, 0]], dtype=torch.int8), torch.tensor([0.5]))
    assert linear_w8a8(x, weights, torch.tensor([1.0])).tolist() == [[108.0], [1.0]]


def test_as_many_inputs_as_32_bits_hold_and_no_more() -> None:
    most = torch.full((1, MOST_INPUTS), 127, dtype=torch.int8)
    assert int(integer_product(most, -most)) == -MOST_INPUTS * 127**2
    more = torch.full((1, MOST_INPUTS + 1), 127, dtype=torch.int8)
    assert torch.iinfo(torch.int32).max < (MOST_INPUTS + 1) * 127**2
    with pytest.raises(RequestError, match=r"has 133145 inputs; it must have at most 133144"):
        integer_product(more, more)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_row_that_is_not_finite_has_no_finite_result(value: float) -> None:
    """And leaves the other rows as they were."""
    x = torch.tensor([[1.0, value, 0.0], [1.0, 2.0, 0.0]])
    weights = quantize_rows(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    out = linear_w8a8(x, weights)
    assert not out[0].isfinite().any()
    assert torch.equal(out[1:], linear_w8a8(x[1:], weights))
