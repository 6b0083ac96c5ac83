"""A mixture of experts: each token is served by the k MLPs that its router chooses.

    out[t] = sum_k weight[t, k] * expert[chosen[t, k]](x[t])                                    (paper, section V)

    shared    + mlp(x[t]), or sigmoid(<gate, x[t]>) * mlp(x[t])                                  Qwen 2 MoE
    residual  mix[t, 0] * out[t] + mix[t, 1] * mlp(x[t]),  mix[t] = softmax(coefficient(x[t]))   arXiv 2201.05596

The weight multiplies what the expert returns, not what it is given: an MLP is not linear. Weighted sums are float32
or wider.

Shapes: B batch, T tokens, M hidden, E experts, K = top_k, N choices of one expert.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..spec.config import MlpConfig
from ..spec.moe import MoeConfig, RouterConfig
from ..spec.weights import LinearWeights, MlpWeights, MoeWeights
from .dispatch import DROPPED, capacity, slots
from .linear import linear as plain_linear
from .mlp import mlp as plain_mlp
from .routing import Routing
from .routing import route as plain_route

Linear = Callable[[Tensor, LinearWeights], Tensor]
Feed = Callable[[Tensor, MlpWeights, MlpConfig], Tensor]
Route = Callable[[Tensor, RouterConfig, Tensor | None], Routing]


class Mlp(Protocol):
    def __call__(self, x_BTM: Tensor, weights: MlpWeights, config: MlpConfig, /, *, linear: Linear) -> Tensor: ...


def moe(
    x_BTM: Tensor,
    weights: MoeWeights,
    config: MoeConfig,
    *,
    linear: Linear = plain_linear,
    mlp: Mlp = plain_mlp,
    route: Route = plain_route,
) -> Tensor:
    """Serve each token by its experts; returns [B, T, M] in x's dtype.

    The capacity is that of all B * T tokens together, which are served in that order. Raises `NumericsError` for a
    router logit that is NaN.
    """
    x_TM = rearrange(x_BTM, "b t m -> (b t) m")
    routing = route(router_logits(x_TM, weights), config.router, weights.choice_bias_E)
    feed = functools.partial(mlp, linear=linear)
    out_TM = _experts(x_TM, routing, weights, config, feed).to(x_TM.dtype)
    if config.shared is not None and weights.shared is not None:
        shared_TM = feed(x_TM, weights.shared, config.shared)
        if weights.shared_gate is not None:
            shared_TM = torch.sigmoid(_wide(linear, x_TM, weights.shared_gate)).to(x_TM.dtype) * shared_TM
        out_TM = out_TM + shared_TM
    if config.residual is not None and weights.residual is not None and weights.coefficient is not None:
        mix_T2 = torch.softmax(_wide(linear, x_TM, weights.coefficient), -1).to(x_TM.dtype)
        out_TM = mix_T2[:, :1] * out_TM + mix_T2[:, 1:] * feed(x_TM, weights.residual, config.residual)
    return rearrange(out_TM, "(b t) m -> b t m", b=x_BTM.shape[0])


def router_logits(x_TM: Tensor, weights: MoeWeights) -> Tensor:
    """Return the logits [T, E] by which the tokens choose, in float32 or wider whatever x's dtype is."""
    return _wide(plain_linear, x_TM, weights.router)


def _experts(x_TM: Tensor, routing: Routing, weights: MoeWeights, config: MoeConfig, feed: Feed) -> Tensor:
    """The weighted sum of what the chosen experts make of each token, in the weights' dtype."""
    expert_TK, weight_TK = routing
    served_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if config.capacity is not None:
        places = capacity(len(x_TM), config.router.experts, config.router.top_k, config.capacity)
        served_TK = slots(routing, config.router.experts, places, config.capacity.drop_order) != DROPPED
    out_TM = torch.zeros_like(x_TM, dtype=weight_TK.dtype)
    for expert in sorted(set(expert_TK[served_TK].tolist())):
        token_N, choice_N = ((expert_TK == expert) & served_TK).nonzero(as_tuple=True)
        served_NM = feed(x_TM[token_N], weights.experts[expert], config.expert)
        out_TM[token_N] += weight_TK[token_N, choice_N, None] * served_NM.to(weight_TK.dtype)  # a token comes once
    return out_TM


def _wide(linear: Linear, x_TM: Tensor, weights: LinearWeights) -> Tensor:
    return linear(x_TM.to(torch.promote_types(x_TM.dtype, torch.float32)), weights)
