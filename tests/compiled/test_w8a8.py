"""The compiled product of 8-bit integers: both forms are exact, and the one that saturates is not chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.compiled.w8a8 import PIECE, Form, form_here, integer_product, linear_w8a8, prepare

CPU = torch.device("cpu")


@given(
    rows=st.integers(1, 20),
    outputs=st.integers(1, 20),
    inputs=st.integers(1, 40) | st.integers(PIECE - 1, 2 * PIECE + 2),
    extreme=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_every_form_that_is_chosen_is_exact(rows: int, outputs: int, inputs: int, extreme: bool, seed: int) -> None:
    """Also for codes of 127 alone, and more inputs than float32 adds exactly."""
    generator = torch.Generator().manual_seed(seed)
    quantized_RI, quantized_NI = (
        torch.randint(-127, 128, (size, inputs), generator=generator).to(torch.int8) for size in (rows, outputs)
    )
    if extreme:
        quantized_RI, quantized_NI = (
            torch.where(code > 0, 127, -127).to(torch.int8) for code in (quantized_RI, quantized_NI)
        )
        quantized_RI[0], quantized_NI[0] = 127, 127
    truth_RN = (quantized_RI.double() @ quantized_NI.double().t()).to(torch.int32)
    for form in {form_here(CPU), Form.FLOAT32}:
        kept_NI = quantized_NI if form is Form.INT8 else quantized_NI.float()
        assert torch.equal(integer_product(quantized_RI, kept_NI, form), truth_RN), form


def test_a_processor_that_saturates_gets_the_other_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(left: Tensor, right: Tensor) -> Tensor:
        """With left as unsigned bytes, which is put right at the end."""
        pair = ((left.int() + 128)[:, :, None] * right.int()[None]).unflatten(1, (-1, 2)).sum(2)
        return pair.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * right.int().sum(0)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert form_here(CPU) is Form.FLOAT32
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: left.int() @ right.int())
    assert form_here(CPU) is Form.INT8


def test_prepared_codes_are_memory_of_their_own() -> None:
    weight_NI, bias_N = torch.ones(3, 5), torch.ones(3)
    codes = prepare(weight_NI, bias_N, Form.FLOAT32)
    before = linear_w8a8(torch.ones(2, 5), codes, Form.FLOAT32)
    weight_NI.zero_()
    bias_N.zero_()
    assert torch.equal(linear_w8a8(torch.ones(2, 5), codes, Form.FLOAT32), before)
