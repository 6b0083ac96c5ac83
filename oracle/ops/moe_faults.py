"""Seeded faults of a mixture of experts.

Shapes: B batch, T tokens, M hidden, F intermediate, E experts, K = top_k, C capacity.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference.linear import linear
from ...reference.mlp import activation, mlp
from ...reference.moe import moe
from ...reference.routing import Routing, route
from ...spec.config import MlpConfig
from ...spec.moe import CapacityConfig, DropOrder, MoeConfig
from ...spec.weights import MlpWeights, MoeWeights
from ..case import Inputs
from ..op import Function
from ..variants import changed
from .route import ROUTE


def _routed_by(fault: str) -> Function:
    """The block with a router of `route`'s faults."""
    wrong = ROUTE.mutants[fault]

    def component(logit_TE: Tensor, config: Any, choice_bias_E: Tensor | None) -> Routing:
        return Routing(*wrong(logit_TE=logit_TE, config=config, choice_bias_E=choice_bias_E))

    return lambda **inputs: moe(**inputs, route=component)


def _fed_by(feed: Callable[[Tensor, MlpWeights, MlpConfig], Tensor]) -> Function:
    """The block with another MLP."""
    return lambda **inputs: moe(**inputs, mlp=lambda x, weights, config, linear: feed(x, weights, config))


def _weights(**parts: Callable[[MoeWeights], Any]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {
        "weights": replace(inputs["weights"], **{name: change(inputs["weights"]) for name, change in parts.items()})
    }


def _config(change: Callable[[MoeConfig], MoeConfig]) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {"config": change(inputs["config"])}


def _expert(**fields: Any) -> Callable[[Inputs], Inputs]:
    """Every expert with other conventions, where it is gated."""
    return _config(
        lambda config: replace(config, expert=replace(config.expert, **fields)) if config.expert.gated else config
    )


def _gate_and_up_swapped(weights: MoeWeights) -> Any:
    experts = weights.experts
    return experts if experts.gate is None else replace(experts, gate=experts.up, up=experts.gate)


def _experts_rolled(weights: MoeWeights) -> Any:
    """Expert e has the matrices of expert e - 1, the last one's first."""
    experts = weights.experts
    return replace(experts, down=replace(experts.down, weight_ENI=experts.down.weight_ENI.roll(1, 0)))


def _biases_dropped(weights: MoeWeights) -> Any:
    return replace(weights.experts, down=replace(weights.experts.down, bias_EN=None))


def _bias_after_the_weight(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """The bias of down is added whole, whatever the expert's weight is."""
    bias_EN = weights.experts.down.bias_EN
    out_BTM = moe(x_BTM, weights, config)
    if bias_EN is None or config.residual is not None:
        return out_BTM
    seen: list[Routing] = []

    def noting(*given: Any) -> Routing:
        seen.append(route(*given))
        return seen[-1]

    moe(x_BTM, weights, config, route=noting)
    expert_TK, weight_TK = seen[0]
    more_TM = ((1 - weight_TK)[..., None] * bias_EN.float()[expert_TK]).sum(1)
    return out_BTM + more_TM.view(out_BTM.shape).to(out_BTM.dtype)


def _weights_before(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """Each token is multiplied by its weight before the expert, which is not linear."""
    x_TM = x_BTM.flatten(0, 1)
    seen: list[Routing] = []

    def noting(*given: Any) -> Routing:
        seen.append(route(*given))
        return seen[-1]

    if config.capacity is not None or config.shared is not None or config.residual is not None:
        return moe(x_BTM, weights, config)
    moe(x_BTM, weights, config, route=noting)
    expert_TK, weight_TK = seen[0]
    out_TM = torch.zeros_like(x_TM, dtype=torch.float32)
    for expert in range(config.router.experts):
        token_N, choice_N = (expert_TK == expert).nonzero(as_tuple=True)
        given_NM = (x_TM[token_N].float() * weight_TK[token_N, choice_N, None]).to(x_TM.dtype)
        out_TM[token_N] += mlp(given_NM, weights.experts[expert], config.expert).float()
    return out_TM.to(x_TM.dtype).view(x_BTM.shape)


def _router_in_its_dtype(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """Router logits are rounded to the dtype of activations; in float32 to bfloat16."""
    dtype = torch.bfloat16 if x_BTM.dtype is torch.float32 else x_BTM.dtype

    def rounded(logit_TE: Tensor, *rest: Any) -> Routing:
        return route(logit_TE.to(dtype), *rest)

    return moe(x_BTM, weights, config, route=rounded)


def _capacity_of_each_sequence(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    return torch.cat([moe(x_TM[None], weights, config) for x_TM in x_BTM])


def _capacity(change: Callable[[CapacityConfig], CapacityConfig | None]) -> Callable[[Inputs], Inputs]:
    return _config(
        lambda config: config if config.capacity is None else replace(config, capacity=change(config.capacity))
    )


def _other_order(capacity: CapacityConfig) -> CapacityConfig:
    return replace(capacity, drop_order=next(order for order in DropOrder if order is not capacity.drop_order))


def _gate_cut_on_both_sides(x: Tensor, weights: MlpWeights, config: MlpConfig) -> Tensor:
    if config.clamp is None or weights.gate is None:
        return mlp(x, weights, config)
    gate, up = (linear(x, part).clamp(-config.clamp, config.clamp) for part in (weights.gate, weights.up))
    return linear(activation(gate, config.activation) * (up + config.up_offset), weights.down)


def _cut_after_the_activation(x: Tensor, weights: MlpWeights, config: MlpConfig) -> Tensor:
    if config.clamp is None or weights.gate is None:
        return mlp(x, weights, config)
    gate, up = linear(x, weights.gate), linear(x, weights.up).clamp(-config.clamp, config.clamp)
    cut = activation(gate, config.activation).clamp(max=config.clamp)
    return linear(cut * (up + config.up_offset), weights.down)


def _offset_before_the_cut(x: Tensor, weights: MlpWeights, config: MlpConfig) -> Tensor:
    if config.clamp is None or weights.gate is None:
        return mlp(x, weights, config)
    gate, up = linear(x, weights.gate).clamp(max=config.clamp), linear(x, weights.up) + config.up_offset
    return linear(activation(gate, config.activation) * up.clamp(-config.clamp, config.clamp), weights.down)


def _gate_on_everything(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """The gate of the shared MLP multiplies the experts too."""
    out_BTM = moe(x_BTM, weights, config)
    if weights.shared_gate is None:
        return out_BTM
    ungated = moe(x_BTM, replace(weights, shared_gate=None), replace(config, shared_gate=False))
    gate = torch.sigmoid(linear(x_BTM.float(), weights.shared_gate))
    return (gate * ungated.float()).to(x_BTM.dtype)


def _shared_scaled(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """The scale of the experts' weights multiplies the shared MLP too."""
    scale = config.router.scale
    if config.shared is None or scale == 1:
        return moe(x_BTM, weights, config)
    plain = replace(config, router=replace(config.router, scale=1.0))
    return (scale * moe(x_BTM, weights, plain).float()).to(x_BTM.dtype)


def _mix_swapped(weights: MoeWeights) -> Any:
    part = weights.coefficient
    if part is None or part.bias_N is None:
        return part
    return replace(part, weight_NI=part.weight_NI.flip(0), bias_N=part.bias_N.flip(0))


def _residual_added(*, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig) -> Tensor:
    """The residual MLP is added, without the mix."""
    if weights.residual is None:
        return moe(x_BTM, weights, config)
    shared = replace(weights, shared=weights.residual, residual=None, coefficient=None)
    return moe(x_BTM, shared, replace(config, shared=config.residual, residual=None))


def _nan_hidden(inputs: Inputs) -> Inputs:
    """Large numbers are cut, and NaN becomes zero: a guard that hides what went wrong."""
    return {"x_BTM": inputs["x_BTM"].nan_to_num(0.0).clamp(-20, 20)}


FAULTS: Mapping[str, Function] = {
    "inputs_capped": changed(moe, _nan_hidden),
    **{
        f"router_{fault}": _routed_by(fault)
        for fault in (
            "renormalization_forgotten",
            "scaling_forgotten",
            "softmax_over_all_for_the_chosen",
            "choice_bias_in_the_weights",
            "groups_ignored",
            "weights_in_another_order",
        )
    },
    "router_in_16_bits": _router_in_its_dtype,
    "gate_and_up_swapped": changed(moe, _weights(experts=_gate_and_up_swapped)),
    "experts_off_by_one": changed(moe, _weights(experts=_experts_rolled)),
    "bias_of_down_dropped": changed(moe, _weights(experts=_biases_dropped)),
    "bias_of_down_not_weighed": _bias_after_the_weight,
    "weights_before_the_expert": _weights_before,
    "clamp_forgotten": changed(moe, _expert(clamp=None)),
    "gate_cut_on_both_sides": _fed_by(_gate_cut_on_both_sides),
    "cut_after_the_activation": _fed_by(_cut_after_the_activation),
    "offset_before_the_cut": _fed_by(_offset_before_the_cut),
    "offset_forgotten": changed(moe, _expert(up_offset=0.0)),
    "shared_forgotten": changed(moe, _config(lambda config: replace(config, shared=None, shared_gate=False))),
    "shared_gate_forgotten": changed(moe, _weights(shared_gate=lambda weights: None)),
    "shared_gate_on_everything": _gate_on_everything,
    "shared_scaled": _shared_scaled,
    "mix_swapped": changed(moe, _weights(coefficient=_mix_swapped)),
    "residual_added": _residual_added,
    "drop_order_swapped": changed(moe, _capacity(_other_order)),
    "capacity_forgotten": changed(moe, _capacity(lambda capacity: None)),
    "capacity_off_by_one": changed(moe, _capacity(lambda capacity: replace(capacity, factor=1e-9, minimum=2))),
    "capacity_of_each_sequence": _capacity_of_each_sequence,
}
