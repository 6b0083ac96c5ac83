"""Quantisation against exact rational arithmetic and against the definition of the formats."""

import struct
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.reference.quantise import dequantise_rows, quantise_rows, stored
from twinfer.spec.config import Storage

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
    quantised = quantise_rows(torch.tensor(weight, dtype=torch.float32))
    for row, codes, scale in zip(weight, quantised.code_NI.tolist(), quantised.scale_N.tolist(), strict=True):
        expected_scale = float32(max(abs(Fraction(value)) for value in row) / 127)
        assert Fraction(scale) == expected_scale
        for value, code in zip(row, codes, strict=True):
            quotient = float32(Fraction(value) / expected_scale) if expected_scale else Fraction(0)
            assert code == max(-127, min(127, round(quotient)))


@given(weight=rows)
def test_dequantising_is_exact_in_float64(weight: list[list[float]]) -> None:
    quantised = quantise_rows(torch.tensor(weight, dtype=torch.float32))
    wide = dequantise_rows(quantised, torch.float64)
    for codes, scale, values in zip(quantised.code_NI.tolist(), quantised.scale_N.tolist(), wide.tolist(), strict=True):
        assert [Fraction(value) for value in values] == [code * Fraction(scale) for code in codes]


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
