"""The grouped product's kernels, as they are written: within the reference's budget for any number of rows."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.compiled import expert_kernels
from twinfer.compiled.expert_kernels import MOST_ROWS, Span, plain_kernels, tiles_of
from twinfer.compiled.experts import grouped_product, multiplied, one_expert, stack
from twinfer.compiled.packing import Matrix
from twinfer.oracle.budget import Budget, Sizes, judge_elements
from twinfer.reference.linear import linear
from twinfer.reference.quantize import stored
from twinfer.spec.config import Storage
from twinfer.spec.weights import LinearWeights, StackedLinearWeights

from .graph_machine import same_bits

BUDGET = Budget(rows="A")
FEW = max(MOST_ROWS.values())
seeds = st.integers(0, 2**20)
counts = st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, FEW - 1, FEW, FEW + 1, 61]), min_size=1, max_size=5)
"""Rows of each expert: none, few or many; at most 200 of all are multiplied."""


def drawn(
    seed: int, rows: list[int], outputs: int, inputs: int, *, biased: bool
) -> tuple[StackedLinearWeights, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_ENI = torch.randn(len(rows), outputs, inputs, generator=generator)
    bias_EN = torch.randn(len(rows), outputs, generator=generator) if biased else None
    x_AI = torch.randn(sum(rows), inputs, generator=generator)
    return StackedLinearWeights(weight_ENI=weight_ENI, bias_EN=bias_EN), x_AI


def by_operator(x_AI: Tensor, rows: list[int], matrix: Matrix, storage: Storage) -> Tensor:
    """Call the operator as a compiled graph does."""
    out_AN: Tensor = torch.ops.twinfer.grouped_product(x_AI, torch.tensor(rows), *matrix, storage.value, True)
    return out_AN


def assert_in_budget(
    got_AN: Tensor, x_AI: Tensor, rows: list[int], weights: StackedLinearWeights, storage: Storage
) -> None:
    """Compare each expert's rows with the reference's product by the same stored weights."""
    begin = 0
    for expert, count in enumerate(rows):
        x_RI, got_RN = x_AI[begin : begin + count], got_AN[begin : begin + count]
        begin += count
        weight_NI = stored(weights.weight_ENI[expert], storage, torch.float32)
        bias_N = None if weights.bias_EN is None else weights.bias_EN[expert]

        def product(
            change: Callable[[Tensor], Tensor], x: Tensor = x_RI, w: Tensor = weight_NI, b: Tensor | None = bias_N
        ) -> Tensor:
            return linear(change(x), LinearWeights(weight_NI=change(w), bias_N=None if b is None else change(b)))

        sizes = product(lambda part: part.double().abs())
        if count:
            verdict = judge_elements(
                BUDGET, "A N", got_RN, product(lambda part: part), product(lambda part: part.double()), Sizes(sizes)
            )
            assert not verdict.failed, f"expert {expert}: {verdict}"


@given(
    seed=seeds,
    rows=counts,
    outputs=st.sampled_from([16, 5, 33]),
    inputs=st.sampled_from([64, 3, 70, 136]),
    biased=st.booleans(),
    storage=st.sampled_from(Storage),
    piece=st.sampled_from([1, 2**19]),
)
@example(seed=0, rows=[FEW + 1, 0, 1], outputs=33, inputs=70, biased=True, storage=Storage.INT8, piece=1)
@example(seed=0, rows=[FEW + 1, 0, 1], outputs=33, inputs=70, biased=True, storage=Storage.INT4, piece=1)
@settings(max_examples=60)
def test_experts_with_any_number_of_rows_keep_the_budget(
    seed: int, rows: list[int], outputs: int, inputs: int, biased: bool, storage: Storage, piece: int
) -> None:
    """By the kernels as they are written: all experts in one call, and the same bits one expert after another."""
    while sum(rows) > 200:
        rows = rows[1:]
    weights, x_AI = drawn(seed, rows, outputs, inputs, biased=biased)
    matrix = stack([weights], storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_kernels, "_compiled", lambda storage, dtype, threads: plain_kernels(storage, dtype))
        patch.setattr(expert_kernels, "_PIECE", piece)
        got_AN = by_operator(x_AI, rows, matrix, storage)
        backwards = [(each, one_expert(matrix, each)) for each in reversed(range(len(rows))) if rows[each]]
        fetched_AN = multiplied(x_AI, torch.tensor(rows), backwards, outputs, storage, compiled=True)
    assert_in_budget(got_AN, x_AI, rows, weights, storage)
    assert same_bits(got_AN, fetched_AN)


@given(rows=st.lists(st.integers(0, 30), max_size=6))
def test_each_row_is_in_one_tile_and_three_at_most_are_filled_up(rows: list[int]) -> None:
    """Of its own expert; a tile of 4 repeats a row only where 3 are left."""
    ends = [sum(rows[: expert + 1]) for expert in range(len(rows))]
    spans = [Span(expert, end - count, end) for expert, (count, end) in enumerate(zip(rows, ends, strict=True))]
    fours, of_four, ones, of_one = tiles_of(spans)
    expert_of = [(row, of_four[place // 4]) for place, row in enumerate(fours)] + list(zip(ones, of_one, strict=True))
    wanted = {(row, span.expert) for span in spans for row in range(span.begin, span.end)}
    assert set(expert_of) == wanted
    assert len(expert_of) - len(wanted) == sum(count % 4 == 3 for count in rows)


def test_an_expert_has_the_same_bits_wherever_it_lies() -> None:
    """Between others, where an odd size leaves it at any byte, and alone."""
    generator = torch.Generator().manual_seed(0)
    for inputs in (9, 13, 18, 19):
        word_ENI = torch.randn(4, 11, inputs, generator=generator)
        stacked = Matrix(word_ENI, None, None, None, None, 11)
        for rows in (1, 2, 3, 7):
            x_AI = torch.randn(rows, inputs, generator=generator)
            for expert in range(4):
                rows_E = torch.zeros(4, dtype=torch.int64).index_fill(0, torch.tensor(expert), rows)
                alone = stacked._replace(word=word_ENI[expert : expert + 1].clone())
                got = grouped_product(x_AI, rows_E, stacked, Storage.FLOAT32)
                assert torch.equal(got, grouped_product(x_AI, torch.tensor([rows]), alone, Storage.FLOAT32))
