"""Each guarantee on numbers small enough to work out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.budget import Budget, Override, Sizes, judge_elements
from twinfer.oracle.case import Case, Data
from twinfer.oracle.guarantees import Bitwise, Discrete, Statistical, chi_square_p_value
from twinfer.oracle.rows import judge_rows
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import Status, Trial, Verdict

EPS = torch.finfo(torch.float32).eps
CASE = Case(op="none", sizes={})


def trial(reference: Any, candidate: Any, *, axes: str = "T M", case: Case = CASE, **inputs: Any) -> Trial:
    return Trial(case, inputs, reference, candidate, (axes,))


def judged(truth: list[float], got: list[float], eager: list[float] | None = None, rows: str = "T") -> Verdict:
    """One output of two rows of two elements."""
    shaped = [torch.tensor(x).view(2, 2) for x in (got, eager or truth, truth)]
    return judge_rows(Budget(rows=rows), "T M", shaped[0], shaped[1], shaped[2].double(), shaped[2].double().abs())


def test_the_bound_of_a_row_is_k_times_the_eager_error_plus_c_eps_scale() -> None:
    """Truth 1, eager reference off by 8 eps: allowed are 2 * 8 eps + 2 eps = 18 eps, on a row of one element."""
    truth, eager = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1) + 8 * EPS
    for steps, passes in ((18, True), (19, False)):
        verdict = judge_rows(Budget(rows="T"), "T M", torch.ones(1, 1) + steps * EPS, eager, truth, truth)
        assert verdict.failed != passes
        assert verdict.ratio == pytest.approx(steps / 18)


@pytest.mark.parametrize(("steps", "passes"), [(11, True), (12, False)])
def test_the_bound_of_an_element_adds_up_what_may_round(steps: int, passes: bool) -> None:
    """In bfloat16 steps of 2**-7 at 64 + 15: 2 * 1 (eager error) + 2 * (64 / 2 + 64 / 2 + 2**-16 * 2**16) / 64 + 7.

    The truth is 64 and rounds by u * 64 = 2**-2, as does what is stored beside it; sums of float32 reach 2**21, whose
    eps is 2**-2 as well, a near-tie is worth 7 * 2**-1; one step of bfloat16 at 64 is 2**-1, and the reference is one
    off: 2 * 2**-1 + 2 * 3 * 2**-2 + 3 = 5.5, eleven steps.
    """
    truth = torch.full((1, 1), 64.0, dtype=torch.float64)
    eager = torch.full((1, 1), 64.5, dtype=torch.bfloat16)
    sizes = Sizes(torch.full((1, 1), 2.0**21, dtype=torch.float64), narrow=64.0, jump=3.0)
    got = torch.full((1, 1), 64 + steps / 2, dtype=torch.bfloat16)
    assert judge_elements(Budget(rows="T"), "T M", got, eager, truth, sizes).failed != passes


def test_a_small_element_beside_a_huge_one_is_judged_by_its_own_size() -> None:
    """In bfloat16, 3 % of 1 beside 1e6: no row hides it."""
    truth = torch.tensor([[1e6, 1.0]], dtype=torch.float64).to(torch.bfloat16).double()
    for factor, passes in ((1.0, True), (1.03, False)):
        got = (truth * torch.tensor([[1.0, factor]])).to(torch.bfloat16)
        eager = truth.to(torch.bfloat16)
        assert judge_elements(Budget(rows="T"), "T M", got, eager, truth, Sizes(truth.abs())).failed != passes


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, True), (torch.float32, False)])
def test_products_of_bfloat16_may_write_every_subnormal_as_zero(dtype: torch.dtype, passes: bool) -> None:
    """Eight terms of half the smallest normal number: x86 returns zero for four times that number, in bfloat16 only."""
    smallest = torch.finfo(dtype).smallest_normal
    x_1I = torch.full((1, 8), smallest, dtype=dtype)

    def total(x: Tensor) -> Tensor:
        return (0.5 * x.to(torch.promote_types(x.dtype, torch.float32))).sum(-1, keepdim=True).to(x.dtype)

    case = Case(op="none", sizes={"T": 1, "I": 8}, dtype=dtype)
    budget = Budget(rows="T", scale=lambda exact, truth: [0.5 * exact["x"].abs().sum(-1, keepdim=True)])
    flushed = budget.judge(trial(total, lambda x: torch.zeros_like(total(x)), case=case, x=x_1I))
    assert flushed.failed != passes


@pytest.mark.parametrize("scale", [torch.nan, -torch.inf])
def test_a_bound_that_is_no_number_lets_nothing_pass(scale: float) -> None:
    """Where a scale is NaN no comparison holds, neither of elements nor of rows nor of decisions."""
    one = torch.ones(1, 1)
    unknown = torch.full((1, 1), scale, dtype=torch.float64)
    assert judge_elements(Budget(rows="T"), "T M", one, one, one.double(), Sizes(unknown)).failed == (scale != scale)
    assert judge_rows(Budget(rows="T"), "T M", one, one, one.double(), unknown).failed == (scale != scale)
    discrete = Discrete(regret=lambda exact, got: torch.tensor(torch.nan), scale=lambda exact: torch.ones(()))
    assert discrete.judge(trial(lambda x: 0, lambda x: 1, axes="", x=one)).failed


def test_a_row_3_percent_off_beside_a_huge_row_fails() -> None:
    assert not judged([1e6, 2e6, 1.0, 2.0], [1e6, 2e6, 1.0, 2.0]).failed
    verdict = judged([1e6, 2e6, 1.0, 2.0], [1e6, 2e6, 1.03, 2.06])
    assert verdict.failed
    assert "T=1" in verdict.complaint
    assert not judged([1e6, 2e6, 1.0, 2.0], [1e6, 2e6, 1.03, 2.06], rows="").failed, "this is why rows are judged alone"


def test_the_mean_is_judged_too() -> None:
    """An error within the max bound of one bad element, but everywhere."""
    truth = torch.ones(1, 100, dtype=torch.float64)
    eager = torch.ones(1, 100)
    eager[0, 0] += 50 * EPS
    got = torch.ones(1, 100) + 40 * EPS
    verdict = judge_rows(Budget(rows="T"), "T M", got, eager, truth, truth)
    assert verdict.failed
    assert "mean" in verdict.complaint


@pytest.mark.parametrize(
    ("dtype", "sizes", "passes"),
    [
        (torch.bfloat16, 1.0, True),  # 2 * eps * (tiny / eps) are two of the smallest normal numbers
        (torch.bfloat16, 3.0, False),
        (torch.float16, 1.0, False),
        (torch.float32, 1.0, False),
    ],
)
def test_zero_for_a_subnormal_is_allowed_of_bfloat16_alone(dtype: torch.dtype, sizes: float, passes: bool) -> None:
    """A truth of three quarters of so many of the smallest normal numbers, made zero; the reference keeps it."""
    eager = torch.full((1, 1), sizes * 0.75 * torch.finfo(dtype).smallest_normal, dtype=torch.float64).to(dtype)
    truth = eager.double()
    assert judge_rows(Budget(rows="T"), "T M", torch.zeros_like(eager), eager, truth, truth).failed != passes


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_and_infinity_stand_where_the_truth_has_them(wrong: float) -> None:
    assert judged([1.0, 2.0, 3.0, 4.0], [1.0, wrong, 3.0, 4.0]).failed
    assert judged([1.0, wrong, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]).failed
    assert judged([1.0, torch.inf, 3.0, 4.0], [1.0, -torch.inf, 3.0, 4.0]).failed
    assert not judged([1.0, wrong, 3.0, 4.0], [1.0, wrong, 3.0, 4.0]).failed


def test_what_is_infinite_hides_nothing_beside_it() -> None:
    assert judged([1.0, torch.inf, 3.0, 4.0], [1.1, torch.inf, 3.0, 4.0]).failed


def test_a_reference_that_overflows_on_the_way_judges_nobody() -> None:
    """exp(100) / exp(99) is e, which float32 holds, but exp(100) it does not."""
    x = torch.full((1, 1), 100.0)
    verdict = Budget(rows="T").judge(trial(lambda x: torch.exp(x) / torch.exp(x - 1), lambda x: x + 1, x=x))
    assert verdict.status is Status.REJECTED


@pytest.mark.parametrize(
    ("returned", "passes"), [(torch.inf, True), (65504.0, True), (-torch.inf, False), (1.0, False)]
)
def test_a_result_beyond_its_dtype_is_infinite_or_the_largest_number(returned: float, passes: bool) -> None:
    """300 * 300 in float16, whose largest number is 65504."""
    x = torch.full((1, 1), 300.0, dtype=torch.float16)
    verdict = Budget(rows="T").judge(trial(lambda x: x * x, lambda x: torch.full_like(x, returned), x=x))
    assert verdict.failed != passes


def test_integers_leave_no_room() -> None:
    """Off by one part in 10 million: within any budget, and wrong."""
    x = torch.tensor([[3.0, 4.0]])

    def nearly(x: Tensor) -> Tensor:
        return 2 * x * (1 + EPS)

    for data, passes in ((Data.NORMAL, True), (Data.INTEGER, False)):
        case = Case(op="none", sizes={}, data=data)
        verdict = Budget(rows="T", exact_on_integers=True).judge(trial(lambda x: 2 * x, nearly, case=case, x=x))
        assert verdict.failed != passes


def test_other_factors_need_a_reason() -> None:
    with pytest.raises(ValueError, match="Override"):
        Budget(rows="T", k=10.0)
    Budget(rows="T", k=10.0, override=Override(reason="a test", derivation="none", measured=1.0))


@pytest.mark.parametrize(("terms", "off", "passes"), [([255.0, 2.0], 2.0, True), ([9.0, 8.0], 0.125, False)])
def test_integers_that_the_dtype_cannot_count_are_judged_by_the_budget(
    terms: list[float], off: float, passes: bool
) -> None:
    """257 is no number of bfloat16: 256 and 258 are as near. 17 is one, and a step further wrong."""
    x = torch.tensor([terms], dtype=torch.bfloat16)

    def summed(x: Tensor) -> Tensor:
        return x.double().sum(-1, keepdim=True).to(x.dtype)

    case = Case(op="none", sizes={}, data=Data.INTEGER)
    budget = Budget(rows="T", exact_on_integers=True)
    assert budget.judge(trial(summed, lambda x: summed(x) + off, case=case, x=x)).failed != passes


@pytest.mark.parametrize(
    ("candidate", "complaint"),
    [
        (lambda x: x[:1].clone(), "shape"),
        (lambda x: x.double(), "float64"),
        (lambda x: (x.clone(), x.clone()), "2 tensors"),
        (lambda x: x.add_(1).sub(1), "writes to its argument x"),
    ],
)
def test_results_of_another_form_are_failures_with_words(candidate: Any, complaint: str) -> None:
    for guarantee in (Budget(rows="T"), Bitwise()):
        verdict = guarantee.judge(trial(lambda x: x.clone(), candidate, x=torch.ones(2, 2)))
        assert verdict.failed
        assert complaint in verdict.complaint


def test_bitwise_is_about_bits() -> None:
    zero = torch.zeros(1, 1)
    assert Bitwise().judge(trial(lambda x: x, lambda x: -x, x=zero)).failed
    assert not Bitwise().judge(trial(lambda x: x / x, lambda x: x / x, x=zero)).failed


def argmax_regret(exact: dict[str, Any], got: list[Tensor]) -> Tensor:
    return exact["x"].max() - exact["x"][int(got[0])]


@pytest.mark.parametrize(
    ("runner_up", "data", "passes"),
    [
        (1.0, Data.NORMAL, True),  # a tie
        (1.0, Data.INTEGER, False),  # a tie, where ties have a rule
        (1 - 2 * EPS, Data.NORMAL, True),  # within both budgets, of 2 eps each
        (1 - 5 * EPS, Data.NORMAL, False),
    ],
)
def test_decisions_may_differ_at_ties_alone(runner_up: float, data: Data, passes: bool) -> None:
    x = torch.tensor([1.0, runner_up])
    discrete = Discrete(regret=argmax_regret, scale=lambda exact: torch.ones(()))
    case = Case(op="none", sizes={}, data=data)
    verdict = discrete.judge(trial(lambda x: 0, lambda x: 1, axes="", case=case, x=x))
    assert verdict.failed != passes


def test_chi_square_of_a_die() -> None:
    """The textbook example: counts 5 8 9 8 10 20 of 60 throws give 13.4 with 5 degrees of freedom, p = 0.0199."""
    counts = torch.tensor([5.0, 8.0, 9.0, 8.0, 10.0, 20.0])
    assert chi_square_p_value(counts, torch.full((6,), 1 / 6)) == pytest.approx(0.0199, rel=0.01)


def test_an_impossible_outcome_fails_at_once() -> None:
    statistical = Statistical(probability=lambda exact: torch.tensor([1.0, 0.0]))
    verdict = statistical.judge(trial(lambda generator: 0, lambda generator: 1, axes="", generator=torch.Generator()))
    assert verdict.failed
    assert "probability 0" in verdict.complaint


def test_statistical_draws_move_the_generator_on() -> None:
    """400 calls with one generator are 400 draws; had each a copy, they would all be equal, and fail."""

    def fair(generator: torch.Generator) -> int:
        return int(torch.randint(2, (), generator=generator))

    statistical = Statistical(probability=lambda exact: torch.tensor([0.5, 0.5]))
    assert not statistical.judge(trial(fair, fair, axes="", generator=torch.Generator())).failed


def test_of_a_row_whose_squares_leave_the_range_nothing_is_said_and_all_of_its_neighbors() -> None:
    """Rows of 1e20, of 1e17 and of 1: what a norm returns for the first is free, for the others not."""
    op = OPS["rms_norm"]
    case = Case(op="rms_norm", sizes={"B": 1, "T": 3, "M": 8}, options={"epsilon": 1e-5}, seed=4)
    size_T1 = torch.tensor([[1e20], [1e17], [1.0]])
    inputs = op.inputs(case)
    inputs["x"] = inputs["x"] * size_T1

    def wrong_in(row: int, value: float) -> Callable[..., Tensor]:
        def call(**given: Any) -> Tensor:
            out: Tensor = op.reference(**given)
            out[:, row] = value
            return out

        return call

    for value in (torch.nan, torch.inf, 7.0):
        failed = [
            op.guarantee.judge(Trial(case, inputs, op.reference, wrong_in(row, value), op.outputs)).failed
            for row in range(3)
        ]
        assert failed == [False, True, True]
