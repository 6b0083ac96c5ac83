"""Quantization against exact rational arithmetic and against the definition of the formats."""

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.reference.quantize import dequantize_groups, dequantize_rows, quantize_groups, quantize_rows, stored
from twinfer.spec.config import INT4_GROUP, Storage

float32s = st.floats(-(2.0**60), 2.0**60, width=32)
rows = st.integers(1, 8).flatmap(
    lambda inputs: st.lists(st.lists(float32s, min_size=inputs, max_size=inputs), min_size=1, max_size=4)
)


halves = st.integers(-254, 254).map(lambda twice: twice / 2)
tying_rows = st.lists(st.tuples(halves, halves, halves).map(lambda row: [127.0, *row]), min_size=1, max_size=4)
"""Rows whose scale is exactly 1, so that half-integers are ties."""


def float32(value: Fraction) -> Fraction:
    """The float32 nearest to an exact value that is itself the correctly rounded float64 of one operation."""
    return Fraction(struct.unpack("f", struct.pack("f", float(value)))[0])


@given(weight=rows | tying_rows)
def test_codes_are_the_rounded_quotients(weight: list[list[float]]) -> None:
    """Python's round() of an exact fraction is half to even; scale and quotient are rounded to float32 first."""
    quantized = quantize_rows(torch.tensor(weight, dtype=torch.float32))
    for row, codes, scale in zip(weight, quantized.quantized_NI.tolist(), quantized.scale_N.tolist(), strict=True):
        expected_scale = float32(max(abs(Fraction(value)) for value in row) / 127)
        assert Fraction(scale) == expected_scale
        for value, code in zip(row, codes, strict=True):
            quotient = float32(Fraction(value) / expected_scale) if expected_scale else Fraction(0)
            assert code == max(-127, min(127, round(quotient)))


@given(weight=rows)
def test_dequantizing_is_exact_in_float64(weight: list[list[float]]) -> None:
    quantized = quantize_rows(torch.tensor(weight, dtype=torch.float32))
    wide = dequantize_rows(quantized, torch.float64)
    for codes, scale, values in zip(
        quantized.quantized_NI.tolist(), quantized.scale_N.tolist(), wide.tolist(), strict=True
    ):
        assert [Fraction(value) for value in values] == [code * Fraction(scale) for code in codes]


tying_groups = st.lists(st.integers(0, 30).map(lambda twice: [0.0, 15.0, twice / 2]), min_size=1, max_size=4)
"""Rows whose step is exactly 1, so that half-integers are ties."""


def spread_over_groups(weight: list[list[float]]) -> Tensor:
    """Each row three times, among other numbers: at the start, across the end of a group, and as the last, short group.

    The others differ from group to group, so that each group has a step and a least weight of its own.
    """
    inputs = len(weight[0])
    weight_NI = torch.arange(-100.0, 28.0 + inputs).repeat(len(weight), 1)
    for first in (0, INT4_GROUP - 1, 2 * INT4_GROUP):
        weight_NI[:, first : first + inputs] = torch.tensor(weight, dtype=torch.float32)
    return weight_NI


@given(weight=rows | tying_groups)
def test_int4_codes_are_the_rounded_quotients(weight: list[list[float]]) -> None:
    """Of each group of 64 by itself; the range, the step, the distance and the quotient are rounded to float32."""
    weight_NI = spread_over_groups(weight)
    quantized = quantize_groups(weight_NI)
    for n, row in enumerate(weight_NI.tolist()):
        for g, first in enumerate(range(0, len(row), INT4_GROUP)):
            group = [Fraction(value) for value in row[first : first + INT4_GROUP]]
            low, step = min(group), float32(float32(max(group) - min(group)) / 15)
            assert Fraction(float(quantized.min_NG[n, g])) == low
            assert Fraction(float(quantized.scale_NG[n, g])) == step
            for value, code in zip(group, quantized.quantized_NI[n, first:].tolist(), strict=False):
                quotient = float32(float32(value - low) / step) if step else Fraction(0)
                assert code == min(15, round(quotient))


@given(weight=rows)
def test_dequantizing_int4_rounds_once_in_float64(weight: list[list[float]]) -> None:
    quantized = quantize_groups(spread_over_groups(weight))
    for n, values in enumerate(dequantize_groups(quantized, torch.float64).tolist()):
        for i, value in enumerate(values):
            step, low = (Fraction(float(each[n, i // INT4_GROUP])) for each in (quantized.scale_NG, quantized.min_NG))
            assert value == float(int(quantized.quantized_NI[n, i]) * step + low)


@given(value=float32s, inputs=st.integers(1, 130))
def test_a_group_of_equal_weights_stays_as_it_is(value: float, inputs: int) -> None:
    weight_NI = torch.full((1, inputs), value)
    quantized = quantize_groups(weight_NI)
    assert not quantized.quantized_NI.any()
    assert not quantized.scale_NG.any()
    assert torch.equal(dequantize_groups(quantized, torch.float32), weight_NI)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, -3e38])
def test_a_group_whose_range_is_not_finite_is_nan_and_its_neighbors_are_not(value: float) -> None:
    weight_NI = torch.ones(2, 2 * INT4_GROUP)
    weight_NI[0, 3:5] = torch.tensor([value, 3e38])
    out = stored(weight_NI, Storage.INT4, torch.float32)
    assert out[0, :INT4_GROUP].isnan().all()
    assert torch.equal(out[0, INT4_GROUP:], weight_NI[0, INT4_GROUP:])
    assert torch.equal(out[1], weight_NI[1])


@given(value=st.floats(width=32, allow_nan=False))
def test_bfloat16_rounds_to_nearest_even(value: float) -> None:
    """bfloat16 is the upper half of a float32: rounding adds just under half a unit, or half a unit to an odd one."""
    bits = struct.unpack("I", struct.pack("f", value))[0]
    expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    out = stored(torch.tensor([[value]]), Storage.BFLOAT16, torch.float32)
    assert struct.unpack("I", struct.pack("f", float(out)))[0] == expected & 0xFFFFFFFF


@given(weight=rows)
def test_float32_storage_keeps_every_bit(weight: list[list[float]]) -> None:
    tensor = torch.tensor(weight, dtype=torch.float32)
    assert torch.equal(stored(tensor, Storage.FLOAT32, torch.float64), tensor.double())
