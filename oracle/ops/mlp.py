"""Records of the feed-forward half of a layer: activation, mlp.

Shapes: B batch, T tokens, M hidden, F intermediate.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.mlp import activation, mlp
from ...spec.config import Activation, MlpConfig
from ...spec.decoder import Path
from ...spec.weights import LinearWeights, MlpWeights
from .. import fast
from ..budget import Budget, Sizes
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..op import Function, Op
from ..properties import first_rows_alone, repeats_itself
from ..scale import (
    Known,
    activation_known,
    activation_scale,
    clipped_known,
    exactly,
    linear_known,
    linear_scale,
    product_known,
    shared,
    sum_known,
)
from ..sizes import BATCH, HIDDEN, INPUTS, TOKENS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then
from .linear import linear_weights

KINDS = tuple(Activation)


def activation_cases(pick: Picker) -> Case:
    return Case(
        op="activation",
        sizes={"B": pick.integer(1, 3), "T": pick.integer(1, 4), "F": pick.integer(1, 20)},
        options={"kind": pick.choice([kind.value for kind in KINDS])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def activation_inputs(case: Case) -> Inputs:
    n = case.n
    return {"x": activations(case, "x", n.B, n.T, n.F), "kind": Activation(str(case.options["kind"]))}


def _activation_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [activation_scale(exact["x"].abs())]


def torch_activation(*, x: Tensor, kind: Activation) -> Tensor:
    wide = x.float()
    match kind:
        case Activation.GELU:
            return F.gelu(wide).to(x.dtype)
        case Activation.GELU_TANH:
            return F.gelu(wide, approximate="tanh").to(x.dtype)
        case Activation.GELU_SIGMOID:
            return (F.silu(1.702 * wide) / 1.702).to(x.dtype)
        case Activation.RELU:
            return F.relu(wide).to(x.dtype)
        case Activation.SILU:
            return F.silu(wide).to(x.dtype)


_OTHER = {
    Activation.GELU: Activation.GELU_TANH,
    Activation.GELU_TANH: Activation.GELU,
    Activation.GELU_SIGMOID: Activation.GELU_TANH,
    Activation.SILU: Activation.GELU,
    Activation.RELU: Activation.RELU,
}


def _other_kind(inputs: Inputs) -> Inputs:
    return {"kind": _OTHER[inputs["kind"]]}


def _sigmoid_gelu(*, x: Tensor, kind: Activation) -> Tensor:
    """The 1.702 approximation in place of the tanh one."""
    if kind is Activation.GELU_TANH:
        return (x.float() * torch.sigmoid(1.702 * x.float())).to(x.dtype)
    return activation(x, kind)


def _negatives_leak(*, x: Tensor, kind: Activation) -> Tensor:
    return F.leaky_relu(x.float()).to(x.dtype) if kind is Activation.RELU else activation(x, kind)


def odd_part_is_half(op: Op, function: Function, case: Case) -> None:
    """f(x) - f(-x) = x for every kind, beyond the rounding of both sides."""
    inputs = op.inputs(replace(case, dtype=torch.float32, data=Data.NORMAL))
    x = inputs["x"]
    gap = (function(**inputs).double() - function(x=-x, kind=inputs["kind"]).double() - x.double()).abs()
    allowed = 4 * torch.finfo(torch.float32).eps * activation_scale(x.double().abs())
    assert bool((gap <= allowed).all()), f"f(x) - f(-x) differs from x by up to {float(gap.max()):.3g}"


ACTIVATION = Op(
    name="activation",
    larger=resized({"F": INPUTS, "T": TOKENS, "B": BATCH}),
    paper="III-D, Fig. 1c (region 3)",
    axes="B T F",
    reference=activation,
    outputs=("B T F",),
    cases=activation_cases,
    inputs=activation_inputs,
    guarantee=Budget(rows="B T", scale=_activation_scale),
    properties=(repeats_itself, first_rows_alone("x"), odd_part_is_half),
    variants={"torch": torch_activation},
    mutants={
        "gelu_tanh_for_erf_and_back": changed(activation, _other_kind),
        "sigmoid_for_tanh": _sigmoid_gelu,
        "negatives_leak": _negatives_leak,
        "row_3_percent_off": then(activation, one_row_3_percent_off),
    },
    flops=lambda n: 8 * n.B * n.T * n.F,
    bytes=lambda n: 4 * 2 * n.B * n.T * n.F,
    fast={Path.COMPILED: fast.ACTIVATION},
)


def mlp_cases(pick: Picker) -> Case:
    gated = pick.choice([False, True])
    return Case(
        op="mlp",
        sizes={"B": pick.integer(1, 2), "T": pick.integer(1, 4), "M": pick.integer(1, 12), "F": pick.integer(1, 20)},
        options={
            "kind": pick.choice([kind.value for kind in KINDS]),
            "gated": gated,
            "bias": pick.choice([False, True]),
            "clamp": pick.choice([None, None, 0.75]) if gated else None,
            "up_offset": pick.choice([0.0, 0.0, 1.0]) if gated else 0.0,
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def mlp_inputs(case: Case) -> Inputs:
    n, gated, bias = case.n, bool(case.options["gated"]), bool(case.options["bias"])
    options: Any = case.options
    config = MlpConfig(
        width=n.F,
        activation=Activation(options["kind"]),
        gated=gated,
        bias=bias,
        clamp=options.get("clamp"),
        up_offset=options.get("up_offset", 0.0),
    )
    weights = MlpWeights(
        up=linear_weights(case, "up", n.F, n.M, bias),
        down=linear_weights(case, "down", n.M, n.F, bias),
        gate=linear_weights(case, "gate", n.F, n.M, bias) if gated else None,
    )
    squared = case.dtype is torch.float16  # which stores the product of up and gate
    x_BTM = activations(case, "x", n.B, n.T, n.M, large=5, squared=squared)
    return {"x_BTM": x_BTM, "weights": weights, "config": config}


def mlp_known(x: Known, weights: MlpWeights, config: MlpConfig) -> Known:
    """Rounding of the products, through the activation, into the product that follows; each result may be stored."""
    inner = linear_known(x, weights.up).stored
    if weights.gate is None:
        inner = activation_known(inner, config.activation)
    else:
        gate = linear_known(x, weights.gate).stored
        if config.clamp is not None:
            gate = clipped_known(gate, -math.inf, config.clamp)
            inner = clipped_known(inner, -config.clamp, config.clamp)
        if config.up_offset:
            inner = sum_known(inner, exactly(torch.full_like(inner.value, config.up_offset))).stored
        inner = product_known(activation_known(gate, config.activation).stored, inner)
    return linear_known(inner.stored, weights.down)


def _mlp_scale(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    out = mlp_known(exactly(exact["x_BTM"]), exact["weights"], exact["config"])
    return [Sizes(out.wide, shared(out.narrow), reach=_mlp_reach(exact["x_BTM"], exact["weights"]))]


def _mlp_reach(x_BTM: Tensor, weights: MlpWeights) -> Tensor:
    """The largest term of the last product; no activation makes a number larger."""
    inner_BTF = linear_scale(x_BTM.abs(), weights.up)
    if weights.gate is not None:
        inner_BTF = (inner_BTF + 1) * linear_scale(x_BTM.abs(), weights.gate)
    return linear_scale(inner_BTF, weights.down).amax(-1, keepdim=True)


def _plain(x: Tensor, weights: LinearWeights) -> Tensor:
    return F.linear(x, weights.weight_NI.float(), None if weights.bias_N is None else weights.bias_N.float())


def _wide_mlp(*, x_BTM: Tensor, weights: MlpWeights, config: MlpConfig) -> Tensor:
    """Everything in float32, nothing rounded on the way."""
    inner = _plain(x_BTM.float(), weights.up)
    if weights.gate is None:
        inner = torch_activation(x=inner, kind=config.activation)
    else:
        gate = _plain(x_BTM.float(), weights.gate)
        if config.clamp is not None:
            gate, inner = gate.clamp_max(config.clamp), inner.clamp(-config.clamp, config.clamp)
        inner = (inner + config.up_offset) * torch_activation(x=gate, kind=config.activation)
    return _plain(inner, weights.down).to(x_BTM.dtype)


def _rows(linear: LinearWeights, order: Tensor) -> LinearWeights:
    return LinearWeights(
        weight_NI=linear.weight_NI[order], bias_N=None if linear.bias_N is None else linear.bias_N[order]
    )


def _units_shuffled(inputs: Inputs) -> Inputs:
    weights: MlpWeights = inputs["weights"]
    order = permutation(len(weights.up.weight_NI))
    return {
        "weights": MlpWeights(
            up=_rows(weights.up, order),
            gate=None if weights.gate is None else _rows(weights.gate, order),
            down=replace(weights.down, weight_NI=weights.down.weight_NI[:, order]),
        )
    }


def _gate_and_up_swapped(inputs: Inputs) -> Inputs:
    weights: MlpWeights = inputs["weights"]
    return {} if weights.gate is None else {"weights": replace(weights, gate=weights.up, up=weights.gate)}


def _gate_forgotten(inputs: Inputs) -> Inputs:
    config = replace(inputs["config"], gated=False, clamp=None, up_offset=0.0)
    return {"weights": replace(inputs["weights"], gate=None), "config": config}


def _with_config(**fields: Any) -> Function:
    return changed(mlp, lambda inputs: {"config": replace(inputs["config"], **fields)})


def _down_bias_dropped(inputs: Inputs) -> Inputs:
    weights: MlpWeights = inputs["weights"]
    return {"weights": replace(weights, down=replace(weights.down, bias_N=None))}


def _config_other_kind(inputs: Inputs) -> Inputs:
    config: MlpConfig = inputs["config"]
    return {"config": replace(config, activation=_OTHER[config.activation])}


MLP = Op(
    name="mlp",
    larger=resized({"M": HIDDEN, "F": HIDDEN, "T": TOKENS, "B": BATCH}),
    paper="III-D, Fig. 1c (region 3)",
    axes="B T M F",
    reference=mlp,
    outputs=("B T M",),
    cases=mlp_cases,
    inputs=mlp_inputs,
    guarantee=Budget(rows="B T", scale=_mlp_scale),
    properties=(repeats_itself, first_rows_alone("x_BTM")),
    variants={"wide": _wide_mlp, "units_shuffled": changed(mlp, _units_shuffled)},
    mutants={
        "gate_and_up_swapped": changed(mlp, _gate_and_up_swapped),
        "gate_forgotten": changed(mlp, _gate_forgotten),
        "clamp_forgotten": _with_config(clamp=None),
        "up_offset_forgotten": _with_config(up_offset=0.0),
        "down_bias_dropped": changed(mlp, _down_bias_dropped),
        "gelu_tanh_for_erf_and_back": changed(mlp, _config_other_kind),
        "row_3_percent_off": then(mlp, one_row_3_percent_off),
    },
    flops=lambda n: 6 * n.B * n.T * n.M * n.F,
    bytes=lambda n: 4 * (2 * n.B * n.T * n.M + 3 * n.M * n.F),
    no_fast="products and an activation, which have records; the compiled layer joins them: compare_paths judges it",
)
