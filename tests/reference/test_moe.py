"""Routing, dispatch and experts against plain loops, against transformers' blocks, and by their laws."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.reference import dispatch as dispatching
from twinfer.reference.mlp import mlp
from twinfer.reference.moe import moe
from twinfer.reference.routing import Routing, route
from twinfer.spec.config import Activation, MlpConfig
from twinfer.spec.errors import ConfigError, NumericsError
from twinfer.spec.moe import ROUTERS, CapacityConfig, DropOrder, MoeConfig, RouterConfig, Score, router
from twinfer.spec.weights import (
    ExpertWeights,
    LinearWeights,
    MlpWeights,
    MoeWeights,
    StackedLinearWeights,
    assemble,
    tensors,
)

GATED = MlpConfig(width=12, activation=Activation.SILU, gated=True)


def drawn_router(seed: int) -> tuple[RouterConfig, Tensor, Tensor | None]:
    """A router, logits [T, E] with many ties, and the bias of the choice. All sums of integers are exact."""
    pick = random.Random(seed)
    groups = pick.choice([1, 1, 2, 3])
    experts = groups * pick.randint(1, 4)
    kept = pick.randint(1, groups)
    score = pick.choice([each for each in Score if each is not Score.SPARSEMIXER])
    config = RouterConfig(
        experts=experts,
        top_k=pick.randint(1, experts // groups * kept),
        score=score,
        renormalize=pick.random() < 0.5,
        scale=pick.choice([1.0, 2.5]),
        choice_bias=score is not Score.SOFTMAX_OF_CHOSEN and pick.random() < 0.5,
        groups=groups,
        kept_groups=kept,
    )
    logits = [[pick.choice([-2.0, 0.0, 0.5, 3.0]) for _ in range(experts)] for _ in range(pick.randint(1, 7))]
    bias = torch.tensor([pick.choice([0.0, 0.0, 1.0, -1.0]) for _ in range(experts)], dtype=torch.float64)
    return config, torch.tensor(logits, dtype=torch.float64), bias if config.choice_bias else None


def looped(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> list[list[tuple[int, float]]]:
    """For each token its experts and weights, by loops over Python numbers."""
    return [
        _looped_token(row, config, [0.0] * len(row) if bias_E is None else bias_E.tolist()) for row in logit_TE.tolist()
    ]


def _looped_token(logits: list[float], config: RouterConfig, bias: list[float]) -> list[tuple[int, float]]:
    total = sum(math.exp(each) for each in logits)
    score = {
        Score.SOFTMAX: [math.exp(each) / total for each in logits],
        Score.SIGMOID: [1 / (1 + math.exp(-each)) for each in logits],
        Score.SOFTMAX_OF_CHOSEN: logits,
    }[config.score]
    ranking = [round(each + more, 12) for each, more in zip(score, bias, strict=True)]
    size = len(logits) // config.groups
    members = [range(group * size, (group + 1) * size) for group in range(config.groups)]
    of_group = [round(sum(sorted((ranking[e] for e in each), reverse=True)[:2]), 12) for each in members]
    kept = sorted(range(config.groups), key=lambda group: (-of_group[group], group))[: config.kept_groups]
    allowed = sorted(expert for group in kept for expert in members[group])
    chosen = sorted(allowed, key=lambda expert: (-ranking[expert], expert))[: config.top_k]
    weights = [score[expert] for expert in chosen]
    if config.score is Score.SOFTMAX_OF_CHOSEN:
        weights = [math.exp(each) / sum(math.exp(other) for other in weights) for each in weights]
    if config.renormalize:
        weights = [each / sum(weights) for each in weights]
    return [(expert, config.scale * weight) for expert, weight in zip(chosen, weights, strict=True)]


def agrees(function: Callable[..., Routing], seed: int) -> bool:
    """Whether a router chooses what the loops choose, and weighs it so to 12 digits."""
    config, logit_TE, bias_E = drawn_router(seed)
    found, wanted = function(logit_TE, config, bias_E), looped(logit_TE, config, bias_E)
    if found.expert_TK.tolist() != [[expert for expert, _ in token] for token in wanted]:
        return False
    weights = [[weight for _, weight in token] for token in wanted]
    return bool(((found.weight_TK - torch.tensor(weights, dtype=torch.float64)).abs() < 1e-12).all())


@given(st.integers(0, 2**32))
def test_a_router_chooses_and_weighs_as_plain_loops_do(seed: int) -> None:
    """The scores of equal logits are equal to the bit, so ties are ties, and the lower index wins."""
    assert agrees(route, seed)


def _ties_to_the_higher_index(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Routing:
    found = route(logit_TE.flip(1), config, None if bias_E is None else bias_E.flip(0))
    return Routing(config.experts - 1 - found.expert_TK, found.weight_TK)


def _bias_in_the_weights(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Routing:
    expert_TK, weight_TK = route(logit_TE, config, bias_E)
    return Routing(expert_TK, weight_TK if bias_E is None else weight_TK + bias_E[expert_TK])


def _with(**changes: Any) -> Callable[..., Routing]:
    return lambda logit_TE, config, bias_E: route(logit_TE, replace(config, **changes), bias_E)


def _other_score(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Routing:
    other = Score.SOFTMAX if config.score is Score.SIGMOID else Score.SIGMOID
    return route(logit_TE, replace(config, score=other), bias_E)


def _group_by_its_best(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Routing:
    """A group's score is its best expert's, not the sum of its best two."""
    if config.kept_groups == config.groups:
        return route(logit_TE, config, bias_E)
    score_TE = {Score.SOFTMAX: logit_TE.softmax(-1), Score.SIGMOID: logit_TE.sigmoid()}.get(config.score, logit_TE)
    ranking_TE = score_TE if bias_E is None else score_TE + bias_E
    best_TG = ranking_TE.view(len(ranking_TE), config.groups, -1).amax(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
    kept_TG.scatter_(1, best_TG.sort(dim=-1, descending=True, stable=True).indices[:, : config.kept_groups], True)
    allowed_TE = kept_TG.repeat_interleave(config.experts // config.groups, 1)
    whole = replace(config, groups=1, kept_groups=1)
    ranking_bias_TE = torch.where(allowed_TE, 0.0, -1e3) + (0.0 if bias_E is None else bias_E)
    rows = [route(logit_TE[t : t + 1], whole, ranking_bias_TE[t]) for t in range(len(logit_TE))]
    return Routing(torch.cat([row.expert_TK for row in rows]), torch.cat([row.weight_TK for row in rows]))


@pytest.mark.parametrize(
    "mutant",
    [
        _ties_to_the_higher_index,
        _bias_in_the_weights,
        _with(renormalize=False),
        _with(renormalize=True),
        _with(scale=1.0),
        _with(groups=1, kept_groups=1),
        _other_score,
        _group_by_its_best,
    ],
    ids=["ties", "bias", "renormalization_forgotten", "renormalized", "scale", "groups", "score", "group_best"],
)
def test_wrong_routers_are_told_from_right_ones(mutant: Callable[..., Routing]) -> None:
    assert not all(agrees(mutant, seed) for seed in range(300))


def drawn_choices(seed: int) -> tuple[Routing, int, int]:
    """Choices of some tokens (none twice), experts, and a capacity; weights with ties."""
    pick = random.Random(seed)
    experts, tokens = pick.randint(1, 5), pick.randint(1, 9)
    top_k = pick.randint(1, experts)
    chosen = [pick.sample(range(experts), top_k) for _ in range(tokens)]
    weights = [[pick.choice([0.25, 0.5, 0.75]) for _ in range(top_k)] for _ in range(tokens)]
    return Routing(torch.tensor(chosen), torch.tensor(weights)), experts, pick.randint(1, tokens)


@pytest.mark.parametrize("order", list(DropOrder))
@given(seed=st.integers(0, 2**32))
def test_slots_are_those_of_a_plain_loop(order: DropOrder, seed: int) -> None:
    routing, experts, places = drawn_choices(seed)
    tokens, top_k = routing.expert_TK.shape
    attempts = [(k, t) for k in range(top_k) for t in range(tokens)]
    wanted = [[dispatching.DROPPED] * top_k for _ in range(tokens)]
    for expert in range(experts):
        asking = [(k, t) for k, t in attempts if routing.expert_TK[t, k] == expert]
        if order is DropOrder.HIGHEST_SCORE:
            best = sorted(asking, key=lambda each: -float(routing.weight_TK[each[1], each[0]]))  # stable
            asking = [each for each in asking if each in best[:places]]
        for place, (k, t) in enumerate(asking[:places]):
            wanted[t][k] = expert * places + place
    assert dispatching.slots(routing, experts, places, order).tolist() == wanted


@given(seed=st.integers(0, 2**32))
def test_both_forms_of_dispatch_and_combine_are_the_same_to_the_bit(seed: int) -> None:
    """On integers, where no sum rounds; and combining what was dispatched gives each token its served weights."""
    routing, experts, places = drawn_choices(seed)
    slot_TK = dispatching.slots(routing, experts, places)
    mask_TKEC = dispatching.slot_mask(slot_TK, experts, places)
    generator = torch.Generator().manual_seed(seed)
    x_TM = torch.randint(-8, 9, (len(slot_TK), 3), generator=generator).double()
    x_ECM = dispatching.dispatch(x_TM, slot_TK, experts, places)
    assert torch.equal(x_ECM, dispatching.dispatch_one_hot(x_TM, mask_TKEC))
    weight_TK = routing.weight_TK.double()
    out_TM = dispatching.combine(x_ECM, slot_TK, weight_TK)
    assert torch.equal(out_TM, dispatching.combine_one_hot(x_ECM, mask_TKEC, weight_TK))
    served_T = (weight_TK * (slot_TK != dispatching.DROPPED)).sum(1)
    assert torch.equal(out_TM, served_T[:, None] * x_TM)
    assert torch.equal(
        dispatching.dispatch(out_TM, slot_TK, experts, places).any(-1).flatten(),
        out_TM.any(-1)[dispatching.tokens_of_slots(slot_TK, experts, places).clamp_min(0)]
        & (dispatching.tokens_of_slots(slot_TK, experts, places) != dispatching.DROPPED),
    )


def drawn_moe(seed: int, **router_how: Any) -> tuple[MoeConfig, MoeWeights, Tensor]:
    """A small mixture with random float64 weights, and tokens [1, T, M]."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    experts, hidden, tokens = pick.randint(2, 6), 8, pick.randint(1, 9)
    config = MoeConfig(router=RouterConfig(experts=experts, top_k=pick.randint(1, experts), **router_how), expert=GATED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    up, gate = (StackedLinearWeights(weight_ENI=normal(experts, GATED.width, hidden)) for _ in range(2))
    down = StackedLinearWeights(weight_ENI=normal(experts, hidden, GATED.width))
    weights = MoeWeights(
        router=LinearWeights(weight_NI=normal(experts, hidden)), experts=ExpertWeights(up=up, gate=gate, down=down)
    )
    return config, weights, normal(1, tokens, hidden)


def close(one: Tensor, other: Tensor) -> bool:
    """Equal to a thousand roundings of the largest number."""
    return bool((one - other).abs().max() <= 1000 * torch.finfo(one.dtype).eps * other.abs().max())


@pytest.mark.parametrize("seed", range(20))
def test_sparsemixer_is_that_of_transformers(seed: int) -> None:
    """Phi-3.5-MoE's router, whatever its training would draw: both choices, and their weights."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logit_TE = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logit_TE[1::2] = 0.02 * logit_TE[1::2] + logit_TE[1::2, :1]  # near one another, so that some count and some do not
    weight_T2, expert_T2 = sparsemixer(logit_TE, jitter_eps=0.01, training=False)
    found = route(logit_TE, router("phimoe", experts=6, top_k=2))
    assert torch.equal(found.expert_TK, expert_T2)
    assert float((found.weight_TK - weight_T2).abs().max()) < 1e-12


@given(seed=st.integers(0, 2**32))
def test_a_mixture_is_the_weighted_sum_of_its_chosen_experts(seed: int) -> None:
    config, weights, x_1TM = drawn_moe(seed)
    routing = route(x_1TM[0] @ weights.router.weight_NI.T, config.router)
    for t, x_M in enumerate(x_1TM[0]):
        wanted_M = torch.zeros_like(x_M)
        for expert, weight in zip(routing.expert_TK[t].tolist(), routing.weight_TK[t], strict=True):
            wanted_M += weight * mlp(x_M[None, None], weights.experts[expert], config.expert)[0, 0]
        assert close(moe(x_1TM, weights, config)[0, t], wanted_M)


@given(seed=st.integers(0, 2**32))
def test_equal_experts_are_one_expert_where_weights_sum_to_one(seed: int) -> None:
    config, weights, x_1TM = drawn_moe(seed, renormalize=True)
    named = {name: weight[:1].expand_as(weight) for name, weight in tensors(weights.experts)}
    equal = replace(weights, experts=assemble(ExpertWeights, named))
    assert close(moe(x_1TM, equal, config), mlp(x_1TM, weights.experts[0], config.expert))


@given(seed=st.integers(0, 2**32))
def test_room_for_every_token_drops_nothing_and_a_dropped_token_gets_nothing(seed: int) -> None:
    config, weights, x_1TM = drawn_moe(seed)
    roomy = replace(config, capacity=CapacityConfig(factor=float(config.router.experts)))
    assert torch.equal(moe(x_1TM, weights, roomy), moe(x_1TM, weights, config))
    top_1 = replace(config, router=replace(config.router, top_k=1))
    tight = replace(top_1, capacity=CapacityConfig(factor=1e-9))  # one token an expert
    routing = route(x_1TM[0] @ weights.router.weight_NI.T, top_1.router)
    first = [routing.expert_TK[:t].flatten().tolist().count(int(e)) == 0 for t, (e,) in enumerate(routing.expert_TK)]
    served, whole = moe(x_1TM, weights, tight)[0], moe(x_1TM, weights, top_1)[0]
    for t, is_first in enumerate(first):
        assert close(served[t], whole[t]) if is_first else not served[t].any()


@given(seed=st.integers(0, 2**32))
def test_shuffled_tokens_give_shuffled_results(seed: int) -> None:
    config, weights, x_1TM = drawn_moe(seed)
    order = torch.randperm(x_1TM.shape[1], generator=torch.Generator().manual_seed(seed))
    assert close(moe(x_1TM[:, order], weights, config), moe(x_1TM, weights, config)[:, order])


def _experts_of(block: Any) -> ExpertWeights:
    """transformers' stacked experts: the gate's rows above the up's."""
    gate_EFM, up_EFM = block.experts.gate_up_proj.chunk(2, 1)
    return ExpertWeights(
        gate=StackedLinearWeights(weight_ENI=gate_EFM),
        up=StackedLinearWeights(weight_ENI=up_EFM),
        down=StackedLinearWeights(weight_ENI=block.experts.down_proj),
    )


_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
}


def _mixtral() -> tuple[Any, str]:
    sizes = {**_SIZES, "intermediate_size": 12, "num_local_experts": 5, "num_experts_per_tok": 2}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)), "mixtral"


def _qwen2_moe() -> tuple[Any, str]:
    sizes = {
        **_SIZES,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 10,
        "num_experts": 5,
        "num_experts_per_tok": 3,
    }
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes)), "qwen2-moe"


def _qwen3_moe() -> tuple[Any, str]:
    sizes = {**_SIZES, "moe_intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, head_dim=8)), "qwen3-moe"


def _olmoe() -> tuple[Any, str]:
    sizes = {**_SIZES, "intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 3}
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes)), "olmoe"


@pytest.mark.parametrize("build", [_mixtral, _qwen2_moe, _qwen3_moe, _olmoe], ids=lambda build: build.__name__[1:])
@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_mixtures_are_those_of_transformers(build: Callable[[], tuple[Any, str]], seed: int) -> None:
    torch.manual_seed(seed)
    module, recipe = build()
    module.config._experts_implementation = "eager"  # its grouped product refuses float64
    block = module.double().model.layers[0].mlp
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    experts, top_k = len(block.experts.down_proj), module.config.num_experts_per_tok
    shared = getattr(block, "shared_expert", None)
    config = MoeConfig(
        router=router(recipe, experts=experts, top_k=top_k),
        expert=GATED,
        shared=None if shared is None else replace(GATED, width=10),
        shared_gate=shared is not None,
    )
    weights = MoeWeights(
        router=LinearWeights(weight_NI=block.gate.weight),
        experts=_experts_of(block),
        shared=None
        if shared is None
        else MlpWeights(
            **{each: LinearWeights(weight_NI=getattr(shared, f"{each}_proj").weight) for each in ("gate", "up", "down")}
        ),
        shared_gate=None if shared is None else LinearWeights(weight_NI=block.shared_expert_gate.weight),
    )
    x_BTM = torch.randn(2, 6, 16, dtype=torch.float64)
    out = block(x_BTM)
    wanted_BTM = out[0] if isinstance(out, tuple) else out
    found_BTM = moe(x_BTM, weights, config)
    assert float((found_BTM - wanted_BTM).abs().max()) < 1e-6 * float(wanted_BTM.abs().max())  # its scores are float32


def test_residual_experts_are_mixed_by_a_softmax_of_two() -> None:
    """With a coefficient map of biases ln 3 and 0 the experts count three quarters."""
    config, weights, x_1TM = drawn_moe(7)
    with_residual = replace(config, residual=GATED)
    coefficient = LinearWeights(
        weight_NI=torch.zeros(2, 8, dtype=torch.float64), bias_N=torch.tensor([3.0, 1.0], dtype=torch.float64).log()
    )
    both = replace(weights, residual=weights.experts[0], coefficient=coefficient)
    wanted = 0.75 * moe(x_1TM, weights, config) + 0.25 * mlp(x_1TM, weights.experts[0], GATED)
    assert close(moe(x_1TM, both, with_residual), wanted)


def test_recipes_are_listed_where_a_name_is_none() -> None:
    with pytest.raises(ConfigError, match=r"router is 'mixtrall'; it must be one of switch, gshard, mixtral, "):
        router("mixtrall", experts=8, top_k=2)
    assert set(ROUTERS) >= {"switch", "gshard", "mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v3", "gpt-oss"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RouterConfig(experts=4, top_k=5), "top_k is 5; it must be at most the experts .* are 4"),
        (lambda: RouterConfig(experts=6, top_k=3, groups=3, kept_groups=1), "which are 2"),
        (
            lambda: RouterConfig(experts=6, top_k=1, groups=4),
            "groups is 4; it must be a divisor of experts, .* 6",
        ),
        (lambda: CapacityConfig(factor=0.0), "factor is 0.0; it must be a positive number"),
        (lambda: CapacityConfig(factor=float("nan")), "factor is nan; it must be a positive number"),
    ],
)
def test_impossible_routers_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_logit_that_is_nan_is_named() -> None:
    logit_TE = torch.zeros(3, 4)
    logit_TE[1, 2] = torch.nan
    with pytest.raises(NumericsError, match="token 1 for expert 2 is NaN"):
        route(logit_TE, RouterConfig(experts=4, top_k=1))
