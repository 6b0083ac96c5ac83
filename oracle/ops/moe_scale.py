"""The sizes of what is rounded on the way through a mixture of experts, the choice of experts being given.

Shapes: T tokens, M hidden, E experts, K chosen, N choices of one expert.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ...reference.dispatch import DROPPED, capacity, slots
from ...reference.routing import Routing
from ...spec.moe import DropOrder, MoeConfig
from ...spec.weights import LinearWeights, MoeWeights
from ..budget import Sizes
from ..case import Inputs
from ..scale import Known, carried, exactly, linear_known, linear_scale, product_known, root, shared, sum_known
from ..scale_routing import sigmoid_known, softmax_known, weights_known
from .mlp import mlp_known

_EPS = torch.finfo(torch.float32).eps


def moe_known(x_TM: Known, weights: MoeWeights, config: MoeConfig, expert_TK: Tensor, served_TK: Tensor) -> Known:
    """The weighted sum of what the served choices' experts return, and what stands beside it."""
    logit_TE = _float32_known(x_TM, weights.router)
    weight_TK = weights_known(logit_TE, expert_TK, config.router)
    out_TM = _experts(x_TM, weights, config, expert_TK, served_TK, weight_TK)
    if config.shared is not None and weights.shared is not None:
        beside_TM = mlp_known(x_TM, weights.shared, config.shared).stored
        if weights.shared_gate is not None:
            gate_T1 = sigmoid_known(_float32_known(x_TM, weights.shared_gate)).stored
            beside_TM = product_known(gate_T1, beside_TM).stored
        out_TM = sum_known(out_TM.stored, beside_TM)
    if config.residual is not None and weights.residual is not None and weights.coefficient is not None:
        mix_T2 = softmax_known(_float32_known(x_TM, weights.coefficient)).stored
        one, other = (mix_T2.mapped(lambda part, at=at: part[:, at : at + 1]) for at in (0, 1))  # type: ignore[misc]
        beside_TM = mlp_known(x_TM, weights.residual, config.residual).stored
        out_TM = sum_known(product_known(one, out_TM.stored).stored, product_known(other, beside_TM).stored)
    return out_TM


def _float32_known(x_TM: Known, weights: LinearWeights) -> Known:
    """A map to a few numbers, which is float32 in every dtype: nothing is stored before its bias is added."""
    known = linear_known(x_TM, weights)
    return replace(known, narrow=carried(x_TM.narrow, weights.weight_NI))


def _experts(
    x_TM: Known, weights: MoeWeights, config: MoeConfig, expert_TK: Tensor, served_TK: Tensor, weight_TK: Known
) -> Known:
    """The sum rounds by the absolute values of its terms, each of which brings its own errors."""
    value, size, wide, narrow = (torch.zeros_like(x_TM.value) for _ in range(4))
    for expert in sorted(set(expert_TK[served_TK].tolist())):
        token_N, choice_N = ((expert_TK == expert) & served_TK).nonzero(as_tuple=True)
        given_NM = x_TM.mapped(lambda part, rows=token_N: part[rows])  # type: ignore[misc]
        weight_N1 = weight_TK.mapped(lambda part, at=(token_N, choice_N): part[at][:, None])  # type: ignore[misc]
        term_NM = product_known(weight_N1, mlp_known(given_NM, weights.experts[expert], config.expert).stored)
        value[token_N] += term_NM.value  # a token comes once
        size[token_N] += term_NM.value.abs()
        wide[token_N] += term_NM.wide.square()
        narrow[token_N] += term_NM.narrow.square()
    return Known(value, root(size, wide.sqrt()), narrow.sqrt())


def moe_scale(exact: Inputs, expert_TK: Tensor, error_T: Tensor) -> list[Sizes]:
    """Of what is dropped by score, where rounding decides, nothing is known: its sizes are infinite."""
    weights, config, x_BTM = exact["weights"], exact["config"], exact["x_BTM"]
    x_TM = exactly(rearrange(x_BTM, "b t m -> (b t) m"))
    served_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    undecided = False
    if config.capacity is not None:
        weight_TK = weights_known(_float32_known(x_TM, weights.router), expert_TK, config.router)
        routing = Routing(expert_TK, weight_TK.value)
        places = capacity(len(expert_TK), config.router.experts, expert_TK.shape[1], config.capacity)
        served_TK = slots(routing, config.router.experts, places, config.capacity.drop_order) != DROPPED
        if config.capacity.drop_order is DropOrder.HIGHEST_SCORE:
            off_TK = weight_TK.value * (2 * error_T[:, None]).expm1() + 2 * _EPS * weight_TK.wide
            undecided = _undecided(routing, served_TK, off_TK)
    out = moe_known(x_TM, weights, config, expert_TK, served_TK)
    wide, narrow = (part.view(x_BTM.shape) for part in (out.wide, shared(out.narrow)))
    return [Sizes(torch.full_like(wide, torch.inf) if undecided else wide, narrow)]


def _undecided(routing: Routing, served_TK: Tensor, off_TK: Tensor) -> bool:
    """Whether a choice that an expert dropped has a weight within rounding of one that it kept."""
    expert_TK, weight_TK = routing
    for expert in set(expert_TK[~served_TK].tolist()):
        dropped, kept = ((expert_TK == expert) & which for which in (~served_TK, served_TK))
        least, most = (weight_TK - off_TK)[kept], (weight_TK + off_TK)[dropped]
        if len(least) and float(least.min()) <= float(most.max()):
            return True
    return False


def router_scale(exact: Inputs) -> Tensor:
    """The sizes of what each router logit sums, [T, E]."""
    router: LinearWeights = exact["weights"].router
    return linear_scale(rearrange(exact["x_BTM"], "b t m -> (b t) m").abs(), router)
