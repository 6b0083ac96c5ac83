"""The cases are what they claim to be, and every kind, dtype and option comes up."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.oracle.case import DTYPES, Case, Data, RandomPicker, activations, parameters
from twinfer.oracle.op import Op
from twinfer.oracle.ops import attention as attention_ops
from twinfer.oracle.strategies import cases
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import copied, leaves, same_bits

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)


def case_of(data: Data, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    return Case(op="linear", sizes={}, data=data, dtype=dtype, seed=seed)


@given(dtype=dtypes, seed=seeds)
def test_constant_rows_do_not_vary(dtype: torch.dtype, seed: int) -> None:
    x = activations(case_of(Data.CONSTANT, dtype, seed), "x", 5, 8)
    assert bool((x == x[:, :1]).all())
    assert len(set(x[:, 0].tolist())) > 1


@given(dtype=dtypes, seed=seeds)
def test_canceling_rows_sum_to_little(dtype: torch.dtype, seed: int) -> None:
    """Row sums, and products with a weight of the same kind, are small beside the sums of their terms."""
    case = case_of(Data.CANCELING, dtype, seed)
    x, weight = activations(case, "x", 5, 8).double(), parameters(case, "w", 3, 8).double()
    rounding = 8 * torch.finfo(dtype).eps
    assert bool((x.sum(-1).abs() <= (2.0**-7 + rounding) * x.abs().sum(-1)).all())
    assert bool(((x @ weight.T).abs() <= (2.0**-7 + rounding) * (x.abs() @ weight.abs().T)).all())


@given(dtype=dtypes, seed=seeds)
def test_denormals_lie_around_the_smallest_normal_number(dtype: torch.dtype, seed: int) -> None:
    x = activations(case_of(Data.DENORMAL, dtype, seed), "x", 20, 8).double().abs()
    smallest = torch.finfo(dtype).smallest_normal
    assert bool((x < 8 * smallest).all())
    assert bool(((x > 0) & (x < smallest)).any())


@given(dtype=dtypes, seed=seeds)
def test_large_rows_stand_beside_others(dtype: torch.dtype, seed: int) -> None:
    x = activations(case_of(Data.LARGE, dtype, seed), "x", 40, 8).double()
    sizes = x.abs().amax(-1)
    assert float(sizes.max()) > 10 * float(sizes.min())


@given(dtype=dtypes, seed=seeds)
def test_integers_are_exact_in_every_dtype(dtype: torch.dtype, seed: int) -> None:
    case = case_of(Data.INTEGER, dtype, seed)
    for x in (activations(case, "x", 5, 8), parameters(case, "w", 5, 8)):
        assert torch.equal(x, x.round())
        assert float(x.abs().max()) <= 4


def test_zeros_are_zero() -> None:
    assert not activations(case_of(Data.ZEROS), "x", 5, 8).any()


def test_masked_cases_have_queries_that_see_nothing() -> None:
    """In about a third of the rows, and never elsewhere by chance alone."""
    blind = total = 0
    for seed in range(200):
        case = attention_ops.attention_cases(RandomPicker(seed))
        seen_TS = attention_ops.attention_inputs(case)["visible_TS"]
        if case.data is Data.MASKED:
            blind, total = blind + int((~seen_TS.any(-1)).sum()), total + len(seen_TS)
    assert total > 20
    assert 0.2 < blind / total < 0.8


@ops
def test_every_choice_comes_up(op: Op) -> None:
    """Each kind of data, dtype and option comes up in at least 2 % of 400 cases, or of those that have the option."""
    drawn = [op.cases(RandomPicker(seed)) for seed in range(400)]
    for name, counts in {
        "data": Counter(case.data for case in drawn),
        "dtype": Counter(case.dtype for case in drawn),
        **{
            option: Counter(case.options[option] for case in drawn if option in case.options)
            for option in dict.fromkeys(option for case in drawn for option in case.options)
        },
    }.items():
        if name != "start":  # of a table of positions: many values, of which the far ones are rare
            assert min(counts.values()) >= 0.02 * counts.total(), f"{op.name}: {name} {counts}"
    floating = any(leaf.is_floating_point() for leaf in leaves(op.inputs(drawn[0])))
    if floating and op.name != "sample":  # whose logits must not tie
        wanted = {Data.NORMAL, Data.LARGE, Data.CONSTANT, Data.ZEROS, Data.INTEGER}
        assert wanted <= {case.data for case in drawn}, f"{op.name} leaves out kinds of data"


@ops
def test_inputs_are_repeatable_and_print_as_python(op: Op) -> None:
    """Building a case twice, or from its printed form, gives the same bits; and tensors have the case's dtype."""
    for seed in range(20):
        case = op.cases(RandomPicker(seed))
        again = eval(repr(case), {"Case": Case, "Data": Data, "torch": torch})
        assert again == case
        for one, other in zip(leaves(op.inputs(case)), leaves(op.inputs(again)), strict=True):
            assert same_bits(one, other)


@ops
def test_hypothesis_draws_the_same_kind_of_case(op: Op) -> None:
    """The strategy serves the same builder: what it draws can be built, and the reference accepts it."""

    @given(case=cases(op))
    def run(case: Case) -> None:
        assert case.op == op.name
        outs = leaves(op.reference(**copied(op.inputs(case))))
        assert len(outs) == len(op.outputs)
        for axes, out in zip(op.outputs, outs, strict=True):
            assert out.ndim == len(axes.split())

    run()
