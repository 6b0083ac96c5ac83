"""The cases of a mixture of experts: every convention of `MoeConfig` drawn on its own.

Shapes: B batch, T tokens, M hidden, F intermediate, E experts, K = top_k.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...reference.moe import moe
from ...spec.config import Activation, MlpConfig
from ...spec.moe import CapacityConfig, DropOrder, MoeConfig
from ...spec.weights import ExpertWeights, LinearWeights, MlpWeights, MoeWeights, StackedLinearWeights
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations, parameters
from ..op import Function, Op
from .moe_scale import moe_scale, router_scale
from .route import choice_bias, routed_options, router_config


def moe_cases(pick: Picker) -> Case:
    """Denormal logits are all nearly tied, so there every expert is chosen."""
    data, options = pick.choice(UNMASKED), routed_options(pick)
    options = {**options, "groups": 1} if data is Data.DENORMAL else options
    groups = options["groups"]
    return Case(
        op="moe",
        sizes={
            "B": pick.integer(1, 2),
            "T": pick.integer(1, 4),
            "M": pick.integer(6, 32),
            "F": pick.integer(2, 24),
            "E": groups * pick.integer(1, 6 // groups),
            "K": 6 if data is Data.DENORMAL else pick.integer(1, 6),
        },
        options={
            **options,
            "kind": pick.choice([kind.value for kind in Activation]),
            "gated": pick.choice([True, False]),
            "bias": pick.choice([False, True]),
            "clamp": pick.choice([None, 1.0]),
            "up_offset": pick.choice([0.0, 1.0]),
            "beside": pick.choice(["nothing", "shared", "gated", "residual"]),
            "factor": pick.choice([None, None, None, 0.5, 1.0]),
            "order": pick.choice([order.value for order in DropOrder]),
            "alike": pick.choice([False, False, True]),
        },
        data=data,
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def moe_config(case: Case) -> MoeConfig:
    options: Any = case.options
    gated = options["gated"]
    mlp = MlpConfig(
        width=case.n.F,
        activation=Activation(options["kind"]),
        gated=gated,
        bias=options["bias"],
        clamp=options["clamp"] if gated else None,
        up_offset=options["up_offset"] if gated else 0.0,
    )
    plain = replace(mlp, clamp=None, up_offset=0.0)
    factor, beside = options["factor"], options["beside"]
    order = DropOrder.FIRST_COME if options["alike"] else DropOrder(options["order"])  # alike tokens weigh the same
    return MoeConfig(
        router=router_config(case),
        expert=mlp,
        capacity=None if factor is None else CapacityConfig(factor=factor, drop_order=order),
        shared=plain if beside in ("shared", "gated") else None,
        shared_gate=beside == "gated",
        residual=plain if beside == "residual" else None,
    )


def moe_inputs(case: Case) -> Inputs:
    """ALIKE tokens are multiples of one another, so that all choose the same experts, and the others have none."""
    config = moe_config(case)
    x_BTM = activations(case, "x", case.n.B, case.n.T, case.n.M, large=5)
    if case.options["alike"]:
        power_BT1 = torch.randint(-1, 2, (case.n.B, case.n.T, 1), generator=case.generator("powers"))
        x_BTM = (x_BTM[:1, :1].double() * 2.0**power_BT1).to(x_BTM.dtype)
    return {"x_BTM": x_BTM, "weights": _weights(case, config), "config": config}


def _weights(case: Case, config: MoeConfig) -> MoeWeights:
    hidden = case.n.M

    def linear(name: str, outputs: int, inputs: int, bias: bool = False) -> LinearWeights:
        return LinearWeights(
            weight_NI=parameters(case, f"{name} weight", outputs, inputs, spread=2 * inputs**-0.5),
            bias_N=parameters(case, f"{name} bias", outputs) if bias else None,
        )

    def mlp(name: str, of: MlpConfig) -> MlpWeights:
        return MlpWeights(
            up=linear(f"{name} up", of.width, hidden, of.bias),
            down=linear(f"{name} down", hidden, of.width, of.bias),
            gate=linear(f"{name} gate", of.width, hidden, of.bias) if of.gated else None,
        )

    def stacked(name: str, outputs: int, inputs: int) -> StackedLinearWeights:
        experts, bias = config.router.experts, config.expert.bias
        spread = 2 * inputs**-0.5
        return StackedLinearWeights(
            weight_ENI=parameters(case, f"experts {name} weight", experts, outputs, inputs, spread=spread),
            bias_EN=parameters(case, f"experts {name} bias", experts, outputs) if bias else None,
        )

    width = config.expert.width
    return MoeWeights(
        router=linear("router", config.router.experts, hidden, config.router.logit_bias),
        experts=ExpertWeights(
            up=stacked("up", width, hidden),
            down=stacked("down", hidden, width),
            gate=stacked("gate", width, hidden) if config.expert.gated else None,
        ),
        choice_bias_E=choice_bias(case) if config.router.choice_bias else None,
        shared=None if config.shared is None else mlp("shared", config.shared),
        shared_gate=linear("shared gate", 1, hidden) if config.shared_gate else None,
        residual=None if config.residual is None else mlp("residual", config.residual),
        coefficient=None if config.residual is None else linear("coefficient", 2, hidden, bias=True),
    )


class GateUp(StrEnum):
    """How experts' gate and up stand in one matrix of 2 F rows."""

    GATE_FIRST = "gate_first"
    """F rows of the gate, then F of up: transformers' Mixtral, Qwen 3, OLMoE."""
    UP_FIRST = "up_first"
    INTERLEAVED = "interleaved"
    """The gate's row 0, up's row 0, the gate's row 1, and so on: gpt-oss."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedExperts:
    """Experts whose gate and up are one matrix, in the place of `ExpertWeights`."""

    gate_up: StackedLinearWeights
    """[E, 2 F, M]."""
    down: StackedLinearWeights
    """[E, M, F]."""


def fused(experts: ExpertWeights, order: GateUp) -> FusedExperts:
    assert experts.gate is not None

    def join(gate: Tensor, up: Tensor) -> Tensor:
        match order:
            case GateUp.GATE_FIRST:
                return torch.cat([gate, up], 1)
            case GateUp.UP_FIRST:
                return torch.cat([up, gate], 1)
            case GateUp.INTERLEAVED:
                return torch.stack([gate, up], 2).flatten(1, 2)

    gate, up = experts.gate, experts.up
    biases = None if gate.bias_EN is None or up.bias_EN is None else join(gate.bias_EN, up.bias_EN)
    joined = StackedLinearWeights(weight_ENI=join(gate.weight_ENI, up.weight_ENI), bias_EN=biases)
    return FusedExperts(gate_up=joined, down=experts.down)


def taken_apart(experts: FusedExperts, order: GateUp) -> ExpertWeights:
    """Return what `fused` was given."""

    def half(both: Tensor, *, is_gate: bool) -> Tensor:
        if order is GateUp.INTERLEAVED:
            return both[:, 0 if is_gate else 1 :: 2]
        return both.chunk(2, 1)[0 if is_gate == (order is GateUp.GATE_FIRST) else 1]

    def part(*, is_gate: bool) -> StackedLinearWeights:
        both = experts.gate_up
        bias_EN = None if both.bias_EN is None else half(both.bias_EN, is_gate=is_gate)
        return StackedLinearWeights(weight_ENI=half(both.weight_ENI, is_gate=is_gate), bias_EN=bias_EN)

    return ExpertWeights(up=part(is_gate=False), down=experts.down, gate=part(is_gate=True))


def with_plain_experts(inputs: Inputs, order: GateUp) -> Inputs:
    weights = inputs["weights"]
    return {**inputs, "weights": replace(weights, experts=taken_apart(weights.experts, order))}


def of_fused(function: Function, order: GateUp) -> Function:
    """The function of plain experts, on fused ones."""
    return lambda **inputs: function(**with_plain_experts(inputs, order))


def fused_conventions() -> Mapping[str, Callable[[Op], Mapping[str, Any]]]:
    """For each order the option under which experts come with gate and up in one matrix; all are gated then."""

    def under(order: GateUp) -> Callable[[Op], Mapping[str, Any]]:
        def change(op: Op) -> Mapping[str, Any]:
            before = [option.removeprefix("gate_up=") for option in op.chosen if option.startswith("gate_up=")]

            def inputs(case: Case) -> Inputs:
                given = op.inputs(replace(case, options={**case.options, "gated": True}))
                given = with_plain_experts(given, GateUp(before[-1])) if before else given
                weights = given["weights"]
                return {**given, "weights": replace(weights, experts=fused(weights.experts, order))}

            guarantee: Any = op.guarantee
            on_fused = replace(
                guarantee,
                routed=lambda forced: of_fused(partial(moe, route=forced), order),
                scale=lambda exact, *rest: moe_scale(with_plain_experts(exact, order), *rest),
                logit_scale=lambda exact: router_scale(with_plain_experts(exact, order)),
            )
            return {"inputs": inputs, "reference": of_fused(moe, order), "guarantee": on_fused}

        return change

    return {f"gate_up={order}": under(order) for order in GateUp}
