"""A mixture of experts: each token is served by the k MLPs that its router chooses.

    out[t] = sum_k weight[t, k] * expert[chosen[t, k]](x[t])                                    (paper, section V)

    shared    + mlp(x[t]), or sigmoid(<gate, x[t]>) * mlp(x[t])                                  Qwen 2 MoE
    residual  mix[t, 0] * out[t] + mix[t, 1] * mlp(x[t]),  mix[t] = softmax(coefficient(x[t]))   arXiv 2201.05596

The weight multiplies what the expert returns, not what it is given: an MLP is not linear. Weighted sums are float32
or wider.

Shapes: B batch, T tokens, M hidden, E experts, K = top_k, N choices of one expert.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from ..spec.moe import MoeConfig
from ..spec.weights import LinearWeights, MoeWeights
from .dispatch import DROPPED, capacity, slots
from .linear import linear as plain_linear
from .mlp import mlp
from .routing import Routing, route

Linear = Callable[[Tensor, LinearWeights], Tensor]


def moe(x_BTM: Tensor, weights: MoeWeights, config: MoeConfig, *, linear: Linear = plain_linear) -> Tensor:
    """Serve each token by its experts; returns [B, T, M] in x's dtype.

    The capacity is that of all B * T tokens together, which are served in that order. Raises `NumericsError` for a
    router logit that is NaN.
    """
    x_TM = rearrange(x_BTM, "b t m -> (b t) m")
    routing = route_tokens(x_TM, weights, config)
    out_TM = _experts(x_TM, routing, weights, config, linear).to(x_TM.dtype)
    if config.shared is not None and weights.shared is not None:
        shared_TM = mlp(x_TM, weights.shared, config.shared, linear=linear)
        if weights.shared_gate is not None:
            shared_TM = torch.sigmoid(_wide(linear, x_TM, weights.shared_gate)).to(x_TM.dtype) * shared_TM
        out_TM = out_TM + shared_TM
    if config.residual is not None and weights.residual is not None and weights.coefficient is not None:
        mix_T2 = torch.softmax(_wide(linear, x_TM, weights.coefficient), -1).to(x_TM.dtype)
        out_TM = mix_T2[:, :1] * out_TM + mix_T2[:, 1:] * mlp(x_TM, weights.residual, config.residual, linear=linear)
    return rearrange(out_TM, "(b t) m -> b t m", b=x_BTM.shape[0])


def route_tokens(x_TM: Tensor, weights: MoeWeights, config: MoeConfig) -> Routing:
    """Return what the tokens choose: the router's product and all that follows in float32 or wider."""
    wide = torch.promote_types(x_TM.dtype, torch.float32)
    return route(plain_linear(x_TM.to(wide), weights.router), config.router, weights.choice_bias_E)


def _experts(x_TM: Tensor, routing: Routing, weights: MoeWeights, config: MoeConfig, linear: Linear) -> Tensor:
    """The weighted sum of what the chosen experts make of each token, in the weights' dtype."""
    expert_TK, weight_TK = routing
    served_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if config.capacity is not None:
        places = capacity(len(x_TM), config.router.experts, config.router.top_k, config.capacity)
        served_TK = slots(routing, config.router.experts, places, config.capacity.drop_order) != DROPPED
    out_TM = torch.zeros_like(x_TM, dtype=weight_TK.dtype)
    for expert, each in enumerate(weights.experts):
        token_N, choice_N = ((expert_TK == expert) & served_TK).nonzero(as_tuple=True)
        served_NM = mlp(x_TM[token_N], each, config.expert, linear=linear)
        out_TM[token_N] += weight_TK[token_N, choice_N, None] * served_NM.to(weight_TK.dtype)  # a token comes once
    return out_TM


def _wide(linear: Linear, x_TM: Tensor, weights: LinearWeights) -> Tensor:
    return linear(x_TM.to(torch.promote_types(x_TM.dtype, torch.float32)), weights)
