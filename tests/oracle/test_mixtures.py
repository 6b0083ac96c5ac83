"""Routers and blocks of experts: conventions that are no faults, near-ties, and what is reported."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.assertion import Mismatch, assert_matches_reference, assert_obeys
from twinfer.oracle.case import Case, Data, Inputs
from twinfer.oracle.op import Function, Op
from twinfer.oracle.ops.moe_cases import GateUp, of_fused
from twinfer.oracle.resolution import off_by
from twinfer.oracle.search import drawn
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import THIRD_CALL_EVERY
from twinfer.reference.moe import moe
from twinfer.reference.routing import Routing, choice_weights, route
from twinfer.spec.moe import ROUTERS, RouterConfig


def fails(op: Op, function: Function, cases: int = 30) -> float:
    """The share of drawn cases on which it fails."""
    return (
        sum(op.guarantee.judge(op.trial(function, drawn(op, 0, number)[0])).failed for number in range(cases)) / cases
    )


def by_recipe(name: str) -> Function:
    """A router of one recipe that never looks at the config, but for the sizes."""

    def call(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
        own = replace(ROUTERS[name], experts=config.experts, top_k=config.top_k)
        return route(logit_TE, own, choice_bias_E)

    return call


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3-moe", "switch"])
def test_a_router_of_one_recipe_holds_under_its_option_and_under_no_other(name: str) -> None:
    """Renormalizing, and over what the softmax goes, are conventions; with one expert a token some are the same."""
    assert fails(OPS["route"].under(f"recipe={name}"), by_recipe(name)) == 0
    assert fails(OPS["route"], by_recipe(name)) > 0.3
    other = "olmoe" if name in ("mixtral", "qwen3-moe") else "mixtral"
    assert fails(OPS["route"].under(f"recipe={other}"), by_recipe(name)) > 0.3


@pytest.mark.parametrize(
    ("fault", "option"), [("ties_to_the_higher_index", "ties=any"), ("order_of_the_ids", "order=any")]
)
def test_ties_and_order_are_options(fault: str, option: str) -> None:
    """Whoever breaks ties upward, or sorts by expert, is right under the option only."""
    wrong = OPS["route"].mutants[fault]
    allowed = ("ties=any", option) if option == "order=any" else (option,)
    recipe = "recipe=qwen3-moe"  # a SparseMixer's weights depend on the order
    assert fails(OPS["route"].under(recipe, *allowed), wrong) == 0
    assert fails(OPS["route"].under(recipe), wrong) > 0.05


@pytest.mark.parametrize("order", list(GateUp))
def test_gate_and_up_in_one_matrix_have_an_order(order: GateUp) -> None:
    """Experts that take them in another order fail, and the failure names the option under which they hold."""
    op = OPS["moe"].under("recipe=mixtral", f"gate_up={order}")
    other = next(each for each in GateUp if each is not order)
    assert fails(op, of_fused(moe, order), 12) == 0
    case = next(case for number in range(60) if (case := drawn(op, 0, number)[0]).n.F > 2 and case.data is Data.NORMAL)
    with pytest.raises(Mismatch, match=f"holds with --option gate_up={other}"):
        assert_matches_reference(op, of_fused(moe, other), case)


CASE = Case(
    op="moe",
    sizes={"B": 1, "T": 3, "M": 8, "F": 6, "E": 4, "K": 1},
    options={
        "recipe": "switch",
        "scale": 1.0,
        "groups": 1,
        "kept": 1,
        "kind": "silu",
        "gated": True,
        "bias": False,
        "clamp": None,
        "up_offset": 0.0,
        "beside": "nothing",
        "factor": None,
        "order": "first_come",
        "alike": False,
    },
    seed=2,
)


def nearly_tied(gap: float) -> tuple[Op, Callable[[Inputs], Tensor]]:
    """The op on a case whose second token has a second best expert with a logit so much smaller; and who chooses it."""
    op = OPS["moe"]
    inputs = op.inputs(CASE)
    x_M, router = inputs["x_BTM"][0, 1].double(), inputs["weights"].router
    logit_E = router.weight_NI.double() @ x_M
    best, second = logit_E.argsort(descending=True)[:2].tolist()
    weight_NI = router.weight_NI.double().clone()
    weight_NI[second] = weight_NI[best] - gap * x_M / x_M.square().sum()
    weights = replace(inputs["weights"], router=replace(router, weight_NI=weight_NI.float()))

    def second_best(inputs: Inputs) -> Tensor:
        logit_TE = inputs["x_BTM"][0] @ inputs["weights"].router.weight_NI.T
        expert_TK = route(logit_TE, inputs["config"].router).expert_TK.clone()
        expert_TK[1] = best + second - expert_TK[1]
        return expert_TK

    return replace(op, inputs=lambda _: {**inputs, "weights": weights}), second_best


def choosing(second_best: Callable[[Inputs], Tensor], *, reports: bool) -> Function:
    def call(**inputs: Any) -> Any:
        expert_TK = second_best(inputs)

        def forced(logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
            return Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))

        out_BTM = moe(**inputs, route=forced)
        return (out_BTM, expert_TK) if reports else out_BTM

    return call


def test_who_reports_a_near_tie_is_judged_on_it() -> None:
    """Every row is judged on the reported experts; one of them being wrong shows."""
    op, second_best = nearly_tied(1e-7)
    right = choosing(second_best, reports=True)
    verdict = op.guarantee.judge(op.trial(right, CASE))
    assert not verdict.failed, verdict
    assert verdict.left_out == 0
    wrong = off_by(lambda **inputs: right(**inputs)[0], 0.01, "all")
    reported = op.guarantee.judge(op.trial(lambda **inputs: (wrong(**inputs), right(**inputs)[1]), CASE))
    assert "times what the budget allows" in reported.complaint


def test_what_is_reported_is_of_the_call_that_is_judged() -> None:
    """The calls that look for state are on other values, and a report of theirs says nothing of the result."""
    op = OPS["moe"]
    cases = [drawn(op, 0, number)[0] for number in range(200)]
    again = [case for case in cases if case.seed // 8 % THIRD_CALL_EVERY == 0 and op.inputs(case)["x_BTM"].numel()]
    assert len(again) > 20
    for case in again[:30]:
        verdict = op.guarantee.judge(op.trial(op.variants["reporting"], case))
        assert not verdict.failed, (case, verdict.complaint)


def test_behind_a_near_tie_that_is_not_reported_a_row_is_left_out_and_counted() -> None:
    """Both choices pass, and the other rows are still judged."""
    op, second_best = nearly_tied(1e-7)
    for candidate in (op.reference, choosing(second_best, reports=False)):
        verdict = op.guarantee.judge(op.trial(candidate, CASE))
        assert (verdict.failed, verdict.left_out) == (False, 1)
    assert op.guarantee.judge(op.trial(off_by(op.reference, 0.01, "all"), CASE)).failed


@pytest.mark.parametrize("reports", [False, True])
def test_a_choice_that_no_tie_explains_fails(reports: bool) -> None:
    """By the experts where they are reported, by the numbers where they are not."""
    op, second_best = nearly_tied(1e-2)
    verdict = op.guarantee.judge(op.trial(choosing(second_best, reports=reports), CASE))
    assert verdict.failed
    assert ("instead of" in verdict.complaint) is reports


def test_errors_of_2_percent_in_bfloat16_are_seen() -> None:
    """In 9 of 10 cases, and of a hundredth of a percent in float32."""
    op = OPS["moe"]
    for dtype, error in ((torch.bfloat16, 0.02), (torch.float32, 1e-4)):
        cases = [replace(drawn(op, 1, number)[0], dtype=dtype, data=Data.NORMAL) for number in range(12)]
        cases = [replace(case, options={**case.options, "factor": None}) for case in cases]
        seen = [op.guarantee.judge(op.trial(off_by(op.reference, error, "all"), case)).failed for case in cases]
        assert sum(seen) >= 11, f"{dtype}: {sum(seen)} of 12"


@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_tables_keep_a_nan_where_it_is_and_one_hot_forms_do_not(name: str) -> None:
    """Reference and compiled twin under the option; a one-hot form breaks it, and is right by default."""
    strict, plain = OPS[name].under("unseen=nan"), OPS[name]
    one_hot = plain.variants[{"dispatch": "by_loop", "combine": "one_hot"}[name]]
    cases = [drawn(plain, 0, number)[0] for number in range(24)]
    for case in cases:
        for function in (plain.reference, *(twin for twins in plain.fast.values() for twin in twins)):
            assert_obeys(strict, function, case)
        assert_obeys(plain, one_hot, case)
    assert any(breaks(strict, one_hot, case) for case in cases)


def breaks(op: Op, function: Function, case: Case) -> bool:
    try:
        assert_obeys(op, function, case)
    except Mismatch:
        return True
    return False


@pytest.mark.parametrize("name", ["route", "dispatch", "combine", "moe"])
def test_right_implementations_obey_the_properties(name: str) -> None:
    """A property that a right one breaks would be a false alarm."""
    for number in range(10):
        for variant in OPS[name].variants.values():
            assert_obeys(OPS[name], variant, drawn(OPS[name], 0, number)[0])


def test_errors_that_multiply_where_both_factors_vanish_are_no_fault() -> None:
    """Of gate and up that are zero in truth, float32 leaves two roundings, and their product."""
    case = replace(
        CASE,
        sizes={"B": 2, "T": 2, "M": 14, "F": 4, "E": 1, "K": 1},
        options={**CASE.options, "kind": "gelu"},
        data=Data.CANCELING,
        dtype=torch.bfloat16,
        seed=1050157631,
    )
    op = OPS["moe"]
    assert not op.guarantee.judge(op.trial(op.variants["all_experts"], case)).failed


def test_a_router_that_hides_nan_breaks_a_property() -> None:
    """Weights of a token with a NaN logit are NaN, or it is refused; so is a block's token."""
    for name, fault in (("route", "logits_capped"), ("moe", "inputs_capped")):
        op = OPS[name]
        law = next(each for each in op.properties if each.__name__.startswith("nan"))
        case, _ = drawn(op, 0, 0)
        law(op, op.reference, case)
        with pytest.raises(AssertionError, match=r"is NaN, and (the weights are|comes out as)"):
            law(op, op.mutants[fault], case)
