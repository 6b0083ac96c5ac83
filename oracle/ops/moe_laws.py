"""Laws of a mixture of experts. Each asks the op's own guarantee about what must be right as well.

Shapes: B batch, T tokens, M hidden, E experts.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference.mlp import mlp
from ...spec.moe import CapacityConfig, MoeConfig, Score
from ...spec.weights import ExpertWeights, MoeWeights, StackedLinearWeights
from ..case import Case, Inputs
from ..op import Function, Op
from ..properties import with_nan
from ..trial import copied
from ..variants import permutation


def _without_drops(case: Case, **options: Any) -> Case:
    return replace(case, options={**case.options, "factor": None, **options})


def _assert_right(op: Op, function: Function, case: Case, what: str) -> None:
    verdict = op.guarantee.judge(op.trial(function, case))
    assert not verdict.failed, f"{what}: {verdict.complaint}"


def tokens_may_be_permuted(op: Op, function: Function, case: Case) -> None:
    """Where nothing is dropped, tokens in another order come out right in that order."""

    def permuted(*, x_BTM: Tensor, **rest: Any) -> Any:
        order = permutation(len(x_BTM) * x_BTM.shape[1])
        out = function(x_BTM=x_BTM.flatten(0, 1)[order].view(x_BTM.shape), **rest)
        out_BTM = out[0] if isinstance(out, tuple | list) else out
        return out_BTM.flatten(0, 1)[order.argsort()].view(x_BTM.shape)

    _assert_right(op, permuted, _without_drops(case), "tokens permuted")


def enough_places_change_nothing(op: Op, function: Function, case: Case) -> None:
    """A capacity of all tokens drops nothing: the result is right for no capacity."""

    def roomy(*, config: MoeConfig, **rest: Any) -> Any:
        enough = CapacityConfig(factor=float(config.router.experts), minimum=1)
        return function(config=replace(config, capacity=enough), **rest)

    _assert_right(op, roomy, _without_drops(case), "a capacity of all tokens")


def identical_experts_equal_one(op: Op, function: Function, case: Case) -> None:
    """Where weights add up to the scale, experts that are all the same do what one does, whichever are chosen."""
    alone = _without_drops(case, beside="nothing")
    inputs = _of_one_expert(op.inputs(alone))
    config = inputs["config"].router
    if not (config.renormalize or config.score is Score.SOFTMAX_OF_CHOSEN) or config.score is Score.SIGMOID:
        return
    plain = replace(op, inputs=lambda _: inputs)
    got = function(**copied(inputs))
    out_BTM = got[0] if isinstance(got, tuple | list) else got
    exact = plain.trial(function, alone).exact_inputs
    first = exact["weights"].experts[0]
    one_BTM = config.scale * mlp(exact["x_BTM"], first, exact["config"].expert)
    guarantee: Any = op.guarantee
    chosen_TK = torch.zeros(one_BTM.shape[0] * one_BTM.shape[1], config.top_k, dtype=torch.int64)
    chosen_TK += torch.arange(config.top_k)
    sizes = guarantee.scale(exact, chosen_TK, torch.zeros(len(chosen_TK)))[0]
    limits = torch.finfo(out_BTM.dtype)
    rounding = limits.eps * (one_BTM.abs() + sizes.narrow) + torch.finfo(torch.float32).eps * sizes.wide
    allowed = 8 * rounding + limits.smallest_normal
    near = torch.isfinite(one_BTM.to(out_BTM.dtype)) & torch.isfinite(out_BTM)
    gap = (out_BTM.double() - one_BTM).abs().where(near, 0.0)
    assert bool((gap <= allowed).all()), f"all experts are the same, and the result is {float(gap.max()):.3g} off one's"


def _of_one_expert(inputs: Inputs) -> Inputs:
    weights: MoeWeights = inputs["weights"]

    def copies(part: StackedLinearWeights) -> StackedLinearWeights:
        bias_EN = None if part.bias_EN is None else part.bias_EN[:1].expand_as(part.bias_EN).clone()
        return StackedLinearWeights(weight_ENI=part.weight_ENI[:1].expand_as(part.weight_ENI).clone(), bias_EN=bias_EN)

    experts = weights.experts
    same = ExpertWeights(
        up=copies(experts.up),
        down=copies(experts.down),
        gate=None if experts.gate is None else copies(experts.gate),
    )
    return {**inputs, "weights": replace(weights, experts=same)}


def nan_stays(op: Op, function: Function, case: Case) -> None:
    """A token that is NaN is refused by an error of that kind, or comes out as NaN.

    Where nothing is dropped no other token does.
    """
    alone = _without_drops(case)
    inputs = op.inputs(alone)
    token, tokens = case.seed % (case.n.B * case.n.T), case.n.B * case.n.T
    x_BTM = inputs["x_BTM"].flatten(0, 1).index_fill(0, torch.tensor([token]), torch.nan).view(inputs["x_BTM"].shape)
    got = with_nan(op, function, alone, "x_BTM", x_BTM)
    if got is None:
        return
    before = function(**copied(inputs))
    out_TM, before_TM = ((each[0] if isinstance(each, tuple | list) else each).flatten(0, 1) for each in (got, before))
    assert bool(out_TM[token].isnan().all()), f"token {token} is NaN, and comes out as {out_TM[token].tolist()}"
    others = torch.arange(tokens) != token
    spread = out_TM[others].isnan() & ~before_TM[others].isnan()
    assert not bool(spread.any()), f"only token {token} is NaN, and others come out as NaN"
