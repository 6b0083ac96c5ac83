"""The compiled path's functions in each compute dtype: within the budget of that dtype, and returned in it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from twinfer.compiled import compute as compute_file
from twinfer.compiled.attention import attend_decode, decode_mask
from twinfer.compiled.linear import linear_decode, linear_prefill
from twinfer.compiled.norms import rms_norm
from twinfer.compiled.packing import pack, quantize
from twinfer.oracle.budget import Budget
from twinfer.oracle.case import Case, Inputs, RandomPicker
from twinfer.oracle.op import Fast, Op
from twinfer.oracle.table import OPS
from twinfer.spec.config import Storage

COMPUTED = (
    "linear",
    "head_logits",
    "sbi_gemm",
    "scale_and_cap",
    "embed",
    "norm",
    "layer_norm",
    "rms_norm",
    "activation",
    "rotate",
    "attention",
    "shaped_attention",
    "linear_w8a8",
    "dequantize_rows",
    "dequantize_groups",
)
CASES = 12

twins = pytest.mark.parametrize(
    ("op", "twin"),
    [
        pytest.param(OPS[name], twin, id=f"{name}-{twin.name}-{number}")
        for name in COMPUTED
        for fast in OPS[name].fast.values()
        for number, twin in enumerate(fast)
    ],
)


def as_stored(op: Op) -> Op:
    """Return the op with inputs that float32 holds, as the path's stored weights are; their dtype stays the case's."""

    def inputs(case: Case) -> Inputs:
        return pytree.tree_map(
            lambda leaf: leaf.float().to(leaf.dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
            op.inputs(case),
        )

    return replace(op, inputs=inputs)


def cases_in(op: Op, twin: Fast, compute: torch.dtype) -> Iterator[Case]:
    """Draw cases without end, each in this dtype; those on which the path never calls the function are left out."""
    for seed in range(10_000):
        case = replace(op.cases(RandomPicker(seed)), dtype=compute)
        if twin.applies(op.inputs(case)):
            yield case


@pytest.mark.parametrize("compute", compute_file.COMPUTE_DTYPES, ids=str)
@twins
def test_functions_keep_the_budget_of_compute(op: Op, twin: Fast, compute: torch.dtype) -> None:
    """On drawn cases in each dtype, uncompiled, no output is further from the float64 truth than its budget allows."""
    op = as_stored(op)
    assert isinstance(op.guarantee, Budget)
    for case in islice(cases_in(op, twin, compute), CASES):
        verdict = op.guarantee.judge(op.trial(twin, case))
        assert not verdict.failed, f"{verdict.complaint} {verdict.details} on {case}"


@pytest.mark.parametrize("storage", list(Storage))
def test_a_processor_without_16_bit_products_multiplies_in_float32(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are then not rounded to 16 bits: of one input the product is x * weight, rounded once."""
    weight_NI, x_TI = torch.linspace(-1, 1, 20)[:, None] / 3, torch.tensor([[1.0], [1.0 / 3], [0.1]])
    matrix, x_TI = pack(quantize(weight_NI, storage)), x_TI.to(torch.float16)
    monkeypatch.setitem(compute_file._CPU_MULTIPLIES, torch.float16, False)
    wanted_TN = linear_prefill(x_TI.to(torch.float32), matrix, storage).to(torch.float16)
    assert torch.equal(linear_prefill(x_TI, matrix, storage), wanted_TN)


def test_sums_of_float16_are_not_float16() -> None:
    """Squares, partial sums and scores past 65504 are finite where the result is."""
    x_TM = torch.full((1, 64), 1000.0, dtype=torch.float16)
    assert rms_norm(x_TM, torch.ones(64), 1e-5).tolist() == [[1.0] * 64]
    weight_NI = torch.where(torch.arange(64) < 32, 120.0, -120.0)[None]
    for storage in Storage:
        matrix = pack(quantize(weight_NI, storage))
        assert linear_decode(x_TM, matrix, storage).tolist() == [[0.0]]
        assert linear_prefill(x_TM, matrix, storage).tolist() == [[0.0]]
    query, where = torch.full((1, 2, 64), 100.0, dtype=torch.float16), torch.tensor([0])
    mask = decode_mask(where, where, where, None, compute=torch.float16)
    how = {"mask": mask, "position_R": where, "slot_S": where, "scale": 0.125}
    assert torch.equal(attend_decode(query, query, query / 100, **how), query / 100)  # a score of 640 000 / 8
