"""Right implementations of a mixture of experts, which sum in other orders.

Shapes: B batch, T tokens, M hidden, F intermediate, E experts, K = top_k, C capacity.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import dispatch as reference
from ...reference.dispatch import capacity, slots
from ...reference.moe import moe
from ...reference.routing import Routing, route
from ...spec.config import MlpConfig
from ...spec.moe import MoeConfig
from ...spec.weights import LinearWeights, MlpWeights, MoeWeights
from .mlp import torch_activation


def _linear(x: Tensor, weights: LinearWeights) -> Tensor:
    return F.linear(x, weights.weight_NI.float(), None if weights.bias_N is None else weights.bias_N.float())


def _mlp(x_TM: Tensor, weights: MlpWeights, config: MlpConfig) -> Tensor:
    """Everything in float32, nothing rounded on the way."""
    up = _linear(x_TM, weights.up)
    if weights.gate is None:
        return _linear(torch_activation(x=up, kind=config.activation), weights.down)
    gate = _linear(x_TM, weights.gate)
    if config.clamp is not None:
        gate, up = gate.clamp(max=config.clamp), up.clamp(-config.clamp, config.clamp)
    return _linear((up + config.up_offset) * torch_activation(x=gate, kind=config.activation), weights.down)


def _beside(x_TM: Tensor, out_TM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    if config.shared is not None and weights.shared is not None:
        shared_TM = _mlp(x_TM, weights.shared, config.shared)
        if weights.shared_gate is not None:
            shared_TM = shared_TM * _linear(x_TM, weights.shared_gate).sigmoid()
        return shared_TM + out_TM
    if config.residual is not None and weights.residual is not None and weights.coefficient is not None:
        mix_2T1 = _linear(x_TM, weights.coefficient).softmax(-1).t()[..., None]
        return _mlp(x_TM, weights.residual, config.residual) * mix_2T1[1] + out_TM * mix_2T1[0]
    return out_TM


def _routed(x_TM: Tensor, weights: MoeWeights, config: MoeConfig) -> tuple[Routing, Tensor, int]:
    """The routing, the slots of its choices, and the capacity."""
    routing = route(_linear(x_TM, weights.router), config.router, weights.choice_bias_E)
    experts, how = config.router.experts, config.capacity
    places = capacity(len(x_TM), experts, config.router.top_k, how)
    slot_TK = slots(routing, experts, places, *([] if how is None else [how.drop_order]))
    return routing, slot_TK, places


def all_experts(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """Every expert serves every token, and counts by a weight that is zero where it was not chosen."""
    x_TM = x_BTM.flatten(0, 1).float()
    (expert_TK, weight_TK), slot_TK, _ = _routed(x_TM, weights, config)
    weight_TK = weight_TK * (slot_TK != reference.DROPPED)
    weight_TE = torch.zeros(len(x_TM), config.router.experts).scatter(1, expert_TK, weight_TK)
    out_TM = torch.zeros_like(x_TM)
    for expert in reversed(range(config.router.experts)):
        weight_T1 = weight_TE[:, expert, None]
        served_TM = weight_T1 * _mlp(x_TM, weights.experts[expert], config.expert)
        out_TM = out_TM + served_TM.where(weight_T1 != 0, 0.0)  # what overflows where it was not chosen is nothing
    return _beside(x_TM, out_TM, weights, config).to(x_BTM.dtype).view(x_BTM.shape)


def gathered_in_slots(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """Dispatch by tables, each expert on its slots, combine."""
    x_TM = x_BTM.flatten(0, 1).float()
    routing, slot_TK, places = _routed(x_TM, weights, config)
    x_ECM = reference.dispatch(x_TM, slot_TK, config.router.experts, places)
    served_ECM = torch.stack([_mlp(x_CM, weights.experts[expert], config.expert) for expert, x_CM in enumerate(x_ECM)])
    out_TM = reference.combine(served_ECM, slot_TK, routing.weight_TK)
    return _beside(x_TM, out_TM, weights, config).to(x_BTM.dtype).view(x_BTM.shape)


def reporting(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> tuple[Tensor, Tensor]:
    """The reference, which returns the experts as well."""
    seen: list[Tensor] = []

    def noting(*given: Any) -> Routing:
        routing = route(*given)
        seen.append(routing.expert_TK)
        return routing

    return moe(x_BTM, weights, config, route=noting), seen[0]
