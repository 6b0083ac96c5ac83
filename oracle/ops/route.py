"""The record of the router: route.

Shapes: T tokens, E experts, K = top_k, G groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference.routing import Routing, choice_weights, route
from ...spec.decoder import Path
from ...spec.moe import ROUTERS, RouterConfig, Score
from .. import fast_moe as fast
from ..case import DTYPES, UNMASKED, Case, Inputs, Picker, activations, parameters
from ..choices import Chosen
from ..op import Convention, Function, Op
from ..properties import repeats_itself, with_nan
from ..sizes import TOKENS, resized
from ..variants import changed, permutation, then

EXPERTS = (16, 17, 31, 32, 60, 63, 64, 65, 128, 129, 160, 256)
"""Numbers of experts of published models, and their neighbors."""


def routed_options(pick: Picker) -> dict[str, Any]:
    """A recipe, and what models combine it with."""
    return {
        "recipe": pick.choice(list(ROUTERS)),
        "scale": pick.choice([1.0, 2.5]),
        "groups": pick.choice([1, 1, 2, 4]),
        "kept": pick.integer(1, 4),
    }


def route_cases(pick: Picker) -> Case:
    options = routed_options(pick)
    groups = options["groups"]
    return Case(
        op="route",
        sizes={"T": pick.integer(1, 6), "E": groups * pick.integer(1, 12 // groups), "K": pick.integer(1, 12)},
        options=options,
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def router_config(case: Case) -> RouterConfig:
    """The recipe at the case's sizes: groups that divide the experts, and no more choices than can be made."""
    options: Any = case.options
    groups = options["groups"] if case.n.E % options["groups"] == 0 else 1
    kept = min(options["kept"], groups)
    top_k = min(case.n.K, case.n.E // groups * kept)
    recipe = ROUTERS[options["recipe"]]
    return replace(recipe, experts=case.n.E, top_k=top_k, scale=options["scale"], groups=groups, kept_groups=kept)


def choice_bias(case: Case) -> Tensor:
    """A bias as large as scores are apart, in float32 as models keep it; equal ones among them."""
    bias_E = parameters(replace(case, dtype=torch.float32), "choice bias", case.n.E, spread=0.2)
    return bias_E if case.seed % 2 else (4 * bias_E).round() / 4


def route_inputs(case: Case) -> Inputs:
    config = router_config(case)
    return {
        "logit_TE": activations(case, "logits", case.n.T, case.n.E, large=5),
        "config": config,
        "choice_bias_E": choice_bias(case) if config.choice_bias else None,
    }


def recipes() -> Mapping[str, Convention]:
    """For each recipe the option under which every case has it: for routers that read no config.

    Groups and a scale are DeepSeek-V3's; under another recipe there are none.
    """

    def under(name: str) -> Callable[[Op], Mapping[str, Any]]:
        plain = {} if ROUTERS[name].choice_bias else {"scale": 1.0, "groups": 1, "kept": 1}

        def change(op: Op) -> Mapping[str, Any]:
            inputs = op.inputs
            return {"inputs": lambda case: inputs(replace(case, options={**case.options, "recipe": name, **plain}))}

        return change

    return {f"recipe={name}": under(name) for name in ROUTERS}


def _by_loop(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    """Python's own sort, on float32 scores; it has no place for NaN."""
    wide_TE = logit_TE.float()
    if wide_TE.isnan().any():
        raise ValueError("a logit is NaN")
    score_TE = _score(wide_TE, config)
    if config.score is Score.SOFTMAX:
        score_TE = torch.exp(wide_TE - wide_TE.logsumexp(-1, keepdim=True))
    ranked_TE = score_TE if choice_bias_E is None else score_TE + choice_bias_E
    size, chosen = config.experts // config.groups, []
    for ranked in ranked_TE.tolist():
        blocks = [sorted(ranked[first : first + size], reverse=True) for first in range(0, config.experts, size)]
        kept = sorted(range(config.groups), key=lambda group: (-sum(blocks[group][:2]), group))[: config.kept_groups]
        allowed = [expert for expert in range(config.experts) if expert // size in kept]
        chosen.append(sorted(allowed, key=lambda expert: (-ranked[expert], expert))[: config.top_k])
    expert_TK = torch.tensor(chosen)
    return Routing(expert_TK, choice_weights(wide_TE, expert_TK, config))


def _softmax_and_renormalize(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    """A softmax over all experts, its best k renormalized, which is a softmax over the chosen: so does Mixtral."""
    if config.score is not Score.SOFTMAX_OF_CHOSEN:
        return route(logit_TE, config, choice_bias_E)
    near = (logit_TE.float().amax(-1, keepdim=True) - logit_TE.float()).amax() < 50  # or what is chosen may vanish
    if not near:
        return route(logit_TE, config, choice_bias_E)
    over_all = replace(config, score=Score.SOFTMAX, renormalize=True)
    expert_TK = route(logit_TE, config).expert_TK
    return Routing(expert_TK, choice_weights(logit_TE.float(), expert_TK, over_all))


def _with(**fields: Any) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {"config": replace(inputs["config"], **fields)}


def _chosen_by(rank: Callable[[Tensor, RouterConfig, Tensor | None], Tensor]) -> Function:
    """The best of another ranking, weighed as they should be."""

    def wrong(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
        wide_TE = logit_TE.float()
        order_TE = rank(wide_TE, config, choice_bias_E).sort(dim=-1, descending=True, stable=True).indices
        expert_TK = order_TE[:, : config.top_k]
        return Routing(expert_TK, choice_weights(wide_TE, expert_TK, config))

    return wrong


def _weighed_by(weigh: Callable[[Tensor, Tensor, RouterConfig, Tensor | None], Tensor]) -> Function:
    """The right experts with other weights."""

    def wrong(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
        expert_TK = route(logit_TE, config, choice_bias_E).expert_TK
        return Routing(expert_TK, weigh(logit_TE.float(), expert_TK, config, choice_bias_E))

    return wrong


def _last_of_ties(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    bias_E = None if choice_bias_E is None else choice_bias_E.flip(0)
    expert_TK, weight_TK = route(logit_TE.flip(1), config, bias_E)
    return Routing(config.experts - 1 - expert_TK, weight_TK)


def _group_by_maximum(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None, *, best: int = 1) -> Tensor:
    score_TE = _score(logit_TE, config) + (0 if bias_E is None else bias_E)
    score_TGE = score_TE.view(len(score_TE), config.groups, -1)
    group_TG = score_TGE.topk(min(best, score_TGE.shape[-1]), -1).values.sum(-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_TG.sort(dim=-1, descending=True, stable=True).indices[:, : config.kept_groups], True)
    return score_TGE.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def _score(logit_TE: Tensor, config: RouterConfig) -> Tensor:
    match config.score:
        case Score.SOFTMAX:
            return torch.softmax(logit_TE, -1)
        case Score.SIGMOID:
            return torch.sigmoid(logit_TE)
        case _:
            return logit_TE


def _not_within_groups(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Tensor:
    return _score(logit_TE, config) + (0 if bias_E is None else bias_E)


def _group_by_sum(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Tensor:
    return _group_by_maximum(logit_TE, config, bias_E, best=config.experts)


def _groups_interleaved(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    """Expert e is in group e % G."""
    order = torch.arange(config.experts).view(-1, config.groups).t().flatten()
    bias_E = None if choice_bias_E is None else choice_bias_E[order]
    expert_TK, weight_TK = route(logit_TE[:, order], config, bias_E)
    return Routing(order[expert_TK], weight_TK)


def _bias_in_weights(logit_TE: Tensor, expert_TK: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Tensor:
    if bias_E is None:
        return choice_weights(logit_TE, expert_TK, config)
    weight_TK = (_score(logit_TE, config) + bias_E).gather(1, expert_TK)
    return (
        config.scale * weight_TK / weight_TK.sum(-1, keepdim=True) if config.renormalize else config.scale * weight_TK
    )


def _bias_on_logits(inputs: Inputs) -> Inputs:
    bias_E = inputs["choice_bias_E"]
    return {} if bias_E is None else {"logit_TE": inputs["logit_TE"].float() + bias_E, "choice_bias_E": None}


def _bias_subtracted(inputs: Inputs) -> Inputs:
    bias_E = inputs["choice_bias_E"]
    return {} if bias_E is None else {"choice_bias_E": -bias_E}


def _scaled_before_renormalizing(
    logit_TE: Tensor, expert_TK: Tensor, config: RouterConfig, bias_E: Tensor | None
) -> Tensor:
    """The scale is divided away again."""
    return choice_weights(logit_TE, expert_TK, replace(config, scale=1.0) if config.renormalize else config)


def _in_dtype(dtype: torch.dtype) -> Function:
    """Scores and weights are computed in 16 bits, from logits that are right."""

    def wrong(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
        logit_TE = logit_TE.to(dtype).float()
        return route(logit_TE, config, choice_bias_E)

    return wrong


def _weights_in(dtype: torch.dtype) -> Function:
    def wrong(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
        expert_TK, weight_TK = route(logit_TE, config, choice_bias_E)
        return Routing(expert_TK, weight_TK.to(dtype).float())

    return wrong


def _weights_by_index(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    """Experts in the order of their ids, weights from the best down."""
    expert_TK, weight_TK = route(logit_TE, config, choice_bias_E)
    return Routing(expert_TK.sort(-1).values, weight_TK)


def _by_id(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    """Right, but in the order of the ids."""
    expert_TK, weight_TK = route(logit_TE, config, choice_bias_E)
    order = expert_TK.argsort(-1)
    return Routing(expert_TK.gather(1, order), weight_TK.gather(1, order))


def _jittered(inputs: Inputs) -> Inputs:
    """The noise of training, left on: up to one percent."""
    logit_TE = inputs["logit_TE"]
    noise = torch.rand(logit_TE.shape, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(0.02).add(1)
    return {"logit_TE": logit_TE.float() * noise}


def _capped(inputs: Inputs) -> Inputs:
    """Logits cut to -20 .. 20, which hides a NaN as well."""
    return {"logit_TE": inputs["logit_TE"].nan_to_num(0.0).clamp(-20, 20)}


def _no_peak_taken_off(*, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
    """exp(logit) / sum exp(logit), which overflows."""
    expert_TK, weight_TK = route(logit_TE, config, choice_bias_E)
    if config.score is not Score.SOFTMAX or config.renormalize:
        return Routing(expert_TK, weight_TK)
    power_TE = logit_TE.float().exp()
    return Routing(expert_TK, config.scale * (power_TE / power_TE.sum(-1, keepdim=True)).gather(1, expert_TK))


def _nearness_ignored(logit_TE: Tensor, expert_TK: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Tensor:
    if config.score is Score.SPARSEMIXER:
        config = replace(config, score=Score.SOFTMAX, nearness=None)
    return choice_weights(logit_TE, expert_TK, config)


def nan_shows(op: Op, function: Function, case: Case) -> None:
    """A logit that is NaN is refused by an error of that kind, or its token gets a weight that is NaN.

    No other token does.
    """
    inputs = op.inputs(case)
    token, expert = case.seed % case.n.T, case.seed % case.n.E
    logit_TE = inputs["logit_TE"].clone()
    logit_TE[token, expert] = torch.nan
    routed = with_nan(op, function, case, "logit_TE", logit_TE)
    if routed is None:
        return
    weight_TK = routed[1]
    is_nan_T = weight_TK.isnan().any(-1)
    assert bool(is_nan_T[token]), f"logit [{token}, {expert}] is NaN, and the weights are {weight_TK[token].tolist()}"
    assert int(is_nan_T.sum()) == 1, f"only token {token} has a logit that is NaN, and so are other tokens' weights"


def follows_renumbering(op: Op, function: Function, case: Case) -> None:
    """Experts without groups and ties that get other numbers are chosen by these."""
    inputs = op.inputs(replace(case, options={**case.options, "groups": 1}, dtype=torch.float32))
    order = permutation(case.n.E)
    logit_TE = (
        torch.stack([permutation(case.n.E + token)[: case.n.E] for token in range(case.n.T)]).argsort(-1).float() / 4
    )
    bias_E = inputs["choice_bias_E"]
    before = function(**{**inputs, "logit_TE": logit_TE})
    after = function(
        **{**inputs, "logit_TE": logit_TE[:, order], "choice_bias_E": None if bias_E is None else bias_E[order]}
    )
    tied = bias_E is not None and len(torch.unique(logit_TE[0] + bias_E)) < case.n.E
    if not tied:
        sets = [sorted(each) for each in before[0].tolist()]
        renumbered = [sorted(each) for each in order[after[0]].tolist()]
        assert sets == renumbered, f"experts {sets} became {renumbered} when they were renumbered"


ROUTE = Op(
    name="route",
    larger=resized({"E": EXPERTS, "T": TOKENS, "K": (1, 2, 8, 16)}),
    paper="V-C",
    axes="T E K",
    reference=route,
    outputs=("T K", "T K"),
    cases=route_cases,
    inputs=route_inputs,
    guarantee=Chosen(),
    properties=(repeats_itself, nan_shows, follows_renumbering),
    variants={"by_loop": _by_loop, "softmax_and_renormalize": _softmax_and_renormalize},
    mutants={
        "renormalization_forgotten": changed(route, _with(renormalize=False)),
        "renormalized_always": changed(route, _with(renormalize=True)),
        "ties_to_the_higher_index": _last_of_ties,
        "scaling_forgotten": changed(route, _with(scale=1.0)),
        "scaled_before_renormalizing": _weighed_by(_scaled_before_renormalizing),
        "softmax_over_all_for_the_chosen": changed(
            route,
            lambda inputs: (
                _with(score=Score.SOFTMAX)(inputs) if inputs["config"].score is Score.SOFTMAX_OF_CHOSEN else {}
            ),
        ),
        "softmax_over_the_chosen_for_all": changed(
            route,
            lambda inputs: (
                _with(score=Score.SOFTMAX_OF_CHOSEN)(inputs) if inputs["config"].score is Score.SOFTMAX else {}
            ),
        ),
        "softmax_for_sigmoid": changed(
            route, lambda inputs: _with(score=Score.SOFTMAX)(inputs) if inputs["config"].score is Score.SIGMOID else {}
        ),
        "choice_bias_in_the_weights": _weighed_by(_bias_in_weights),
        "choice_bias_on_the_logits": changed(route, _bias_on_logits),
        "choice_bias_subtracted": changed(route, _bias_subtracted),
        "groups_by_their_maximum": _chosen_by(_group_by_maximum),
        "groups_by_their_sum": _chosen_by(_group_by_sum),
        "groups_ignored": _chosen_by(_not_within_groups),
        "groups_interleaved": _groups_interleaved,
        "float16_router": _in_dtype(torch.float16),
        "bfloat16_router": _in_dtype(torch.bfloat16),
        "float16_weights": _weights_in(torch.float16),
        "weights_in_another_order": _weights_by_index,
        "order_of_the_ids": _by_id,
        "noise_of_training": changed(route, _jittered),
        "softmax_without_its_peak": _no_peak_taken_off,
        "logits_capped": changed(route, _capped),
        "nearness_ignored": _weighed_by(_nearness_ignored),
        "second_best_first": then(route, lambda expert_TK: expert_TK.roll(1, -1)),
    },
    conventions={
        "ties=any": lambda op: {"guarantee": replace(op.guarantee, lower_index=False)},  # type: ignore[type-var]
        "order=any": lambda op: {"guarantee": replace(op.guarantee, best_first=False)},  # type: ignore[type-var]
        **recipes(),
    },
    flops=lambda n: 8 * n.T * n.E,
    bytes=lambda n: 4 * n.T * n.E + 12 * n.T * n.K,
    fast={Path.COMPILED: fast.ROUTE},
)
