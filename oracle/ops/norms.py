"""Records of the norms.

Shapes: B batch, T tokens, M hidden.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.norms import layer_norm, norm, rms_norm
from ...spec.config import NormConfig, NormKind
from ...spec.decoder import Path
from ...spec.weights import NormWeights
from .. import fast
from ..budget import Budget, Scale, Sizes
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations, parameters
from ..op import Function, Op
from ..properties import assert_same_bits, call, first_rows_alone, repeats_itself
from ..scale import norm_reach, norm_scale
from ..sizes import BATCH, INPUTS, TOKENS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then


def norm_cases(pick: Picker, op: str) -> Case:
    return Case(
        op=op,
        sizes={"B": pick.integer(1, 3), "T": pick.integer(1, 4), "M": pick.integer(1, 40)},
        options={"epsilon": pick.choice([1e-5, 1e-6, 0.1, 1e-3])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def _gain(case: Case) -> Tensor:
    """Large in LARGE cases, where a trained model may have gains of 50 too."""
    return parameters(case, "gain", case.n.M, spread=64.0 if case.data is Data.LARGE else 1.0)


def norm_inputs(case: Case) -> Inputs:
    n = case.n
    return {
        "x": activations(case, "x", n.B, n.T, n.M),
        "weights": NormWeights(
            gain_M=_gain(case),
            bias_M=parameters(case, "bias", n.M) if case.op == "layer_norm" else None,
        ),
        "epsilon": case.options["epsilon"],
    }


def _scale_of(kind: NormKind) -> Scale:
    def scale(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
        config = NormConfig(kind=kind, epsilon=exact["epsilon"])
        return [Sizes(norm_scale(exact["x"], exact["weights"], config), reach=norm_reach(exact["x"]))]

    return scale


def _shuffled(function: Function) -> Function:
    """Reduce in another order, then put the elements back."""

    def call(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
        order = permutation(x.shape[-1])
        bias_M = None if weights.bias_M is None else weights.bias_M[order]
        out: Tensor = function(x[..., order], NormWeights(gain_M=weights.gain_M[order], bias_M=bias_M), epsilon)
        return out[..., order.argsort()]

    return call


def _torch_layer_norm(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    bias_M = None if weights.bias_M is None else weights.bias_M.float()
    return F.layer_norm(x.float(), x.shape[-1:], weights.gain_M.float(), bias_M, epsilon).to(x.dtype)


def _torch_rms_norm(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], weights.gain_M.float(), epsilon).to(x.dtype)


def _reciprocal_root(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    wide = x.float()
    return (
        wide * (torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) / x.shape[-1] + epsilon) * weights.gain_M.float())
    ).to(x.dtype)


def _epsilon_outside_the_root(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    wide = x.float()
    if weights.bias_M is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    out = wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + epsilon) * weights.gain_M.float()
    return (out if weights.bias_M is None else out + weights.bias_M.float()).to(x.dtype)


def _mean_not_subtracted(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    out = rms_norm(x.float(), weights, epsilon)
    return (out if weights.bias_M is None else out + weights.bias_M.float()).to(x.dtype)


def _unbiased_variance(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    wide = x.float()
    variance = wide.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1))
    out = (wide - wide.mean(-1, keepdim=True)) / torch.sqrt(variance + epsilon) * weights.gain_M.float()
    return (out if weights.bias_M is None else out + weights.bias_M.float()).to(x.dtype)


def _no_bias(inputs: Inputs) -> Inputs:
    return {"weights": replace(inputs["weights"], bias_M=None)}


def _gain_plus_one(inputs: Inputs) -> Inputs:
    return {"weights": replace(inputs["weights"], gain_M=inputs["weights"].gain_M + 1)}


def _batch_is_one_row(*, x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    """Statistics over all tokens of a sequence instead of over each."""
    wide = x.float()
    return (wide / torch.sqrt(wide.pow(2).mean((-1, -2), keepdim=True) + epsilon) * weights.gain_M.float()).to(x.dtype)


def ignores_powers_of_two(op: Op, function: Function, case: Case) -> None:
    """Doubling the input and quadrupling epsilon changes no bit: nothing but the size was normalized away."""
    case = replace(case, data=Data.NORMAL, dtype=torch.float32)
    inputs = op.inputs(case)
    doubled = call(op, function, case, x=2 * inputs["x"], epsilon=4 * inputs["epsilon"])
    assert_same_bits(call(op, function, case), doubled, "scale invariance")


LAYER_NORM = Op(
    name="layer_norm",
    larger=resized({"M": INPUTS, "T": TOKENS, "B": BATCH}),
    paper="III-D, Fig. 1c (regions 1 and 3)",
    axes="B T M",
    reference=layer_norm,
    outputs=("B T M",),
    cases=partial(norm_cases, op="layer_norm"),
    inputs=norm_inputs,
    guarantee=Budget(rows="B T", scale=_scale_of(NormKind.LAYER)),
    properties=(repeats_itself, first_rows_alone("x"), ignores_powers_of_two),
    variants={"torch": _torch_layer_norm, "shuffled": _shuffled(layer_norm)},
    mutants={
        "mean_not_subtracted": _mean_not_subtracted,
        "epsilon_outside_the_root": _epsilon_outside_the_root,
        "unbiased_variance": _unbiased_variance,
        "bias_dropped": changed(layer_norm, _no_bias),
        "row_3_percent_off": then(layer_norm, one_row_3_percent_off),
    },
    flops=lambda n: 8 * n.B * n.T * n.M,
    bytes=lambda n: 4 * (2 * n.B * n.T * n.M + 2 * n.M),
    fast={Path.COMPILED: fast.LAYER_NORM},
)

RMS_NORM = Op(
    name="rms_norm",
    larger=resized({"M": INPUTS, "T": TOKENS, "B": BATCH}),
    paper="III-D, Fig. 1c (regions 1 and 3)",
    axes="B T M",
    reference=rms_norm,
    outputs=("B T M",),
    cases=partial(norm_cases, op="rms_norm"),
    inputs=norm_inputs,
    guarantee=Budget(rows="B T", scale=_scale_of(NormKind.RMS)),
    properties=(repeats_itself, first_rows_alone("x"), ignores_powers_of_two),
    variants={"torch": _torch_rms_norm, "shuffled": _shuffled(rms_norm), "reciprocal_root": _reciprocal_root},
    mutants={
        "epsilon_outside_the_root": _epsilon_outside_the_root,
        "gain_plus_one": changed(rms_norm, _gain_plus_one),
        "statistics_over_the_sequence": _batch_is_one_row,
        "row_3_percent_off": then(rms_norm, one_row_3_percent_off),
    },
    flops=lambda n: 5 * n.B * n.T * n.M,
    bytes=lambda n: 4 * (2 * n.B * n.T * n.M + n.M),
    fast={Path.COMPILED: fast.RMS_NORM},
)


def configured_cases(pick: Picker) -> Case:
    case = norm_cases(pick, "norm")
    options = {
        **case.options,
        "kind": pick.choice([kind.value for kind in NormKind]),
        "bias": pick.choice([True, False]),
        "gain_from_one": pick.choice([False, True]),
    }
    return replace(case, options=options)


def configured_inputs(case: Case) -> Inputs:
    config = NormConfig(
        kind=NormKind(str(case.options["kind"])),
        epsilon=float(case.options["epsilon"] or 0),
        bias=bool(case.options["bias"]),
        gain_from_one=bool(case.options["gain_from_one"]),
    )
    bias_M = parameters(case, "bias", case.n.M) if config.bias else None
    weights = NormWeights(gain_M=_gain(case), bias_M=bias_M)
    return {"x": activations(case, "x", case.n.B, case.n.T, case.n.M), "weights": weights, "config": config}


def _configured_scale(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    return [Sizes(norm_scale(exact["x"], exact["weights"], exact["config"]), reach=norm_reach(exact["x"]))]


def _torch_norm(*, x: Tensor, weights: NormWeights, config: NormConfig) -> Tensor:
    gain_M = weights.gain_M.float() + 1 if config.gain_from_one else weights.gain_M
    torch_norm = _torch_layer_norm if config.kind is NormKind.LAYER else _torch_rms_norm
    return torch_norm(x=x, weights=replace(weights, gain_M=gain_M), epsilon=config.epsilon)


def _other_kind(inputs: Inputs) -> Inputs:
    kind = next(kind for kind in NormKind if kind is not inputs["config"].kind)
    return {"config": replace(inputs["config"], kind=kind)}


def _gain_as_stored(inputs: Inputs) -> Inputs:
    return {"config": replace(inputs["config"], gain_from_one=False)}


def _bias_from_one_too(inputs: Inputs) -> Inputs:
    bias_M = inputs["weights"].bias_M
    if bias_M is None or not inputs["config"].gain_from_one:
        return {}
    return {"weights": replace(inputs["weights"], bias_M=1 + bias_M)}


NORM = Op(
    name="norm",
    larger=resized({"M": INPUTS, "T": TOKENS, "B": BATCH}),
    paper="III-D, Fig. 1c (regions 1 and 3)",
    axes="B T M",
    reference=norm,
    outputs=("B T M",),
    cases=configured_cases,
    inputs=configured_inputs,
    guarantee=Budget(rows="B T", scale=_configured_scale),
    properties=(repeats_itself, first_rows_alone("x")),
    variants={"torch": _torch_norm},
    mutants={
        "other_kind": changed(norm, _other_kind),
        "gain_from_one_forgotten": changed(norm, _gain_as_stored),
        "bias_from_one_too": changed(norm, _bias_from_one_too),
        "bias_dropped": changed(norm, _no_bias),
        "row_3_percent_off": then(norm, one_row_3_percent_off),
    },
    flops=lambda n: 8 * n.B * n.T * n.M,
    bytes=lambda n: 4 * (2 * n.B * n.T * n.M + 2 * n.M),
    fast={Path.COMPILED: fast.NORM},
)
