"""Each guarantee on numbers small enough to work out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.budget import Budget, Override, judge_rows
from twinfer.oracle.case import Case, Data
from twinfer.oracle.guarantees import Bitwise, Discrete, Statistical, chi_square_p_value
from twinfer.oracle.trial import Status, Trial, Verdict

EPS = torch.finfo(torch.float32).eps
CASE = Case(op="none", sizes={})


def trial(reference: Any, candidate: Any, *, axes: str = "T M", case: Case = CASE, **inputs: Any) -> Trial:
    return Trial(case, inputs, reference, candidate, (axes,))


def judged(truth: list[float], got: list[float], eager: list[float] | None = None, rows: str = "T") -> Verdict:
    """One output of two rows of two elements."""
    shaped = [torch.tensor(x).view(2, 2) for x in (got, eager or truth, truth)]
    return judge_rows(Budget(rows=rows), "T M", shaped[0], shaped[1], shaped[2].double(), shaped[2].double().abs())


def test_the_bound_is_k_times_the_eager_error_plus_c_eps_scale() -> None:
    """Truth 1, eager reference off by 8 eps: allowed are 2 * 8 eps + 2 eps = 18 eps, on a row of one element."""
    truth, eager = torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1) + 8 * EPS
    for steps, passes in ((18, True), (19, False)):
        verdict = judge_rows(Budget(rows="T"), "T M", torch.ones(1, 1) + steps * EPS, eager, truth, truth)
        assert verdict.failed != passes
        assert verdict.ratio == pytest.approx(steps / 18)


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


def test_a_reference_that_overflows_judges_nobody() -> None:
    """exp(100) is finite in float64 and not in float32."""
    x = torch.full((1, 1), 100.0)
    verdict = Budget(rows="T").judge(trial(torch.exp, lambda input: input, input=x))
    assert verdict.status is Status.REJECTED


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


@pytest.mark.parametrize(
    ("candidate", "complaint"),
    [
        (lambda x: x[:1], "shape"),
        (lambda x: x.double(), "float64"),
        (lambda x: (x, x), "2 tensors"),
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
