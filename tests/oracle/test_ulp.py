"""`ulp` against the numbers themselves: the distance to the next one, which torch.nextafter or counting bits gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.oracle.ulp import ulp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """The gap between each finite positive number and its successor, whose bits count one more."""
    bits = torch.arange(0, 0x7FFF, dtype=torch.int16)
    number = bits.view(dtype).double()
    successor = (bits + 1).view(dtype).double()
    inside = torch.isfinite(number) & torch.isfinite(successor)
    assert int(inside.sum()) > 30_000
    assert torch.equal(ulp(number, dtype)[inside], (successor - number)[inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(bits=st.integers(0, 2**62))
def test_wide_numbers(dtype: torch.dtype, bits: int) -> None:
    """The gap that nextafter gives, for any bit pattern."""
    if dtype is torch.float32:
        number = torch.tensor(bits % 0x7F800000, dtype=torch.int32).view(dtype)
    else:
        number = torch.tensor(bits % 0x7FE0000000000000, dtype=torch.int64).view(dtype)
    gap = torch.nextafter(number, torch.tensor(torch.inf, dtype=dtype)).double() - number.double()
    assert float(ulp(number, dtype)) == float(gap) or not torch.isfinite(gap)
    assert float(ulp(-number, dtype)) == float(ulp(number, dtype))


def test_powers_of_two_take_the_step_above() -> None:
    """A classic mistake is the step below, which is half as long."""
    assert float(ulp(torch.tensor(4.0), torch.float32)) == 4 * torch.finfo(torch.float32).eps


def test_no_next_number_no_step() -> None:
    assert bool(ulp(torch.tensor([torch.inf, -torch.inf, torch.nan]), torch.float32).isnan().all())
