"""The compiled path's routers and experts as fast twins: called like the reference.

Shapes: as in the reference's files.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..compiled import dispatch, experts, linear, moe, routing
from ..compiled.embedding import Product
from ..compiled.weights import prepared_moe
from ..reference.dispatch import capacity
from ..spec.config import Storage
from ..spec.moe import CapacityConfig
from .case import Inputs
from .op import Fast, Function


def _route(function: Function, inputs: Inputs) -> tuple[Tensor, Tensor]:
    routed = function(inputs["logit_TE"], inputs["config"], inputs["choice_bias_E"])
    return routed.expert_TK, routed.weight_TK


ROUTE = (Fast(routing.route, _route),)


def _dispatch(function: Function, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the tables; how many choices an expert got is counted as where they are sorted by expert."""
    count, expert_TK = inputs["experts"], inputs["expert_TK"]
    how = {} if inputs["factor"] is None else {name: inputs[name] for name in ("factor", "minimum")}
    places = capacity(len(expert_TK), count, expert_TK.shape[1], CapacityConfig(**how) if how else None)
    slot_TK = dispatch.slots_of(routing.Routing(expert_TK, inputs["weight_TK"]), count, places, inputs["order"])
    x_ECM: Tensor = function(inputs["x_TM"], slot_TK, count, places)
    rows_E = experts.sort_by_expert(expert_TK, count).rows_E
    return slot_TK, dispatch.tokens_of_slots(slot_TK, count, places), rows_E, x_ECM


def _combine(function: Function, inputs: Inputs) -> Tensor:
    out_TM: Tensor = function(inputs["out_ECM"], inputs["slot_TK"], inputs["weight_TK"])
    return out_TM


def _moe_with(product: Product) -> Callable[[Function, Inputs], Tensor]:
    def adapt(function: Function, inputs: Inputs) -> Tensor:
        x_BTM: Tensor = inputs["x_BTM"]
        storage = Storage.BFLOAT16 if x_BTM.dtype is torch.bfloat16 else Storage.FLOAT32  # exact of such weights
        packed = prepared_moe(inputs["weights"], storage, x_BTM.device, x_BTM.dtype)
        out_TM: Tensor = function(x_BTM.flatten(0, 1).contiguous(), packed, inputs["config"], storage, product)
        return out_TM.view(x_BTM.shape)

    return adapt


def _drops_nothing(inputs: Inputs) -> bool:
    return inputs["config"].capacity is None


def _drops_nothing_of_few(inputs: Inputs) -> bool:
    return _drops_nothing(inputs) and inputs["x_BTM"].flatten(0, 1).shape[0] <= linear.PASS_ROWS


MOE = (
    Fast(moe.moe, _moe_with(linear.linear_decode), applies=_drops_nothing_of_few),
    Fast(moe.moe, _moe_with(linear.linear_prefill), applies=_drops_nothing),
)
DISPATCH = (Fast(dispatch.dispatch, _dispatch),)
COMBINE = (Fast(dispatch.combine, _combine),)
