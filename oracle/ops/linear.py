"""The record of the matrix product: linear.

Shapes: B batch, T tokens, I inputs, N outputs.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.linear import linear
from ...spec.decoder import Path
from ...spec.weights import LinearWeights
from .. import fast
from ..budget import Budget, Sizes
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations, parameters
from ..op import Function, Op
from ..properties import call, first_rows_alone, repeats_itself
from ..scale import linear_scale
from ..sizes import BATCH, INPUTS, OUTPUTS, TOKENS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then


def linear_weights(case: Case, name: str, outputs: int, inputs: int, bias: bool) -> LinearWeights:
    """Weights of the case's kind; with the option "int8", such as int8 storage holds exactly."""
    int8 = case.options.get("weights") == "int8"
    return LinearWeights(
        weight_NI=(_int8_exact if int8 else parameters)(case, name + " weight", outputs, inputs),
        bias_N=parameters(case, name + " bias", outputs) if bias else None,
    )


def _int8_exact(case: Case, name: str, outputs: int, inputs: int) -> Tensor:
    """Codes that reach 127 in every row, times a power of two."""
    generator = case.generator(name)
    quantized_NI = torch.randint(-127, 128, (outputs, inputs), generator=generator)
    quantized_NI[:, 0] = 127
    power_N1 = (
        torch.zeros(outputs, 1)
        if case.data is Data.INTEGER
        else torch.randint(-9, -3, (outputs, 1), generator=generator)
    )
    return (quantized_NI * 2.0**power_N1).to(case.dtype)


def linear_cases(pick: Picker) -> Case:
    return Case(
        op="linear",
        sizes={"B": pick.integer(1, 3), "T": pick.integer(1, 4), "I": pick.integer(1, 40), "N": pick.integer(1, 9)},
        options={"bias": pick.choice([False, True]), "weights": pick.choice(["float", "int8"])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def linear_inputs(case: Case) -> Inputs:
    n = case.n
    return {
        "x": activations(case, "x", n.B, n.T, n.I),
        "weights": linear_weights(case, "linear", n.N, n.I, bool(case.options["bias"])),
    }


def _linear_scale(exact: Inputs, truth: list[Tensor]) -> list[Tensor | Sizes]:
    """Where a bias is added, torch's own products of 16 bits may be rounded before."""
    weights: LinearWeights = exact["weights"]
    wide = linear_scale(exact["x"].abs(), weights)
    return [wide if weights.bias_N is None else Sizes(wide, (truth[0] - weights.bias_N).abs() / 2)]


def _torch_linear(*, x: Tensor, weights: LinearWeights) -> Tensor:
    wide = weights.bias_N.float() if weights.bias_N is not None else None
    return F.linear(x.float(), weights.weight_NI.float(), wide).to(x.dtype)


def _sum_of_halves(*, x: Tensor, weights: LinearWeights) -> Tensor:
    half = x.shape[-1] // 2
    left = x[..., :half].float() @ weights.weight_NI[:, :half].float().T
    right = x[..., half:].float() @ weights.weight_NI[:, half:].float().T
    bias = 0 if weights.bias_N is None else weights.bias_N.float()
    return (bias + right + left).to(x.dtype)


def _inputs_shuffled(inputs: Inputs) -> Inputs:
    order = permutation(inputs["x"].shape[-1])
    weights: LinearWeights = inputs["weights"]
    return {"x": inputs["x"][..., order], "weights": replace(weights, weight_NI=weights.weight_NI[:, order])}


def _no_bias(inputs: Inputs) -> Inputs:
    return {"weights": replace(inputs["weights"], bias_N=None)}


def _bias_twice(inputs: Inputs) -> Inputs:
    bias_N = inputs["weights"].bias_N
    return {"weights": replace(inputs["weights"], bias_N=None if bias_N is None else 2 * bias_N)}


def _last_input_lost(inputs: Inputs) -> Inputs:
    weight_NI = inputs["weights"].weight_NI.clone()
    weight_NI[:, -1] = 0
    return {"weights": replace(inputs["weights"], weight_NI=weight_NI)}


def _weights_rounded_to_bfloat16(inputs: Inputs) -> Inputs:
    weight_NI = inputs["weights"].weight_NI
    return {"weights": replace(inputs["weights"], weight_NI=weight_NI.to(torch.bfloat16).to(weight_NI.dtype))}


def adds_up(op: Op, function: Function, case: Case) -> None:
    """On integers, where nothing rounds, the map of a doubled input without bias is the doubled map."""
    whole = replace(case, data=Data.INTEGER, dtype=torch.float32)
    inputs = op.inputs(whole)
    without_bias = _no_bias(inputs)["weights"] if "weights" in inputs else replace(inputs["projection"], bias_N=None)
    weights = "weights" if "weights" in inputs else "projection"
    once = call(op, function, whole, **{weights: without_bias})[0]
    twice = call(op, function, whole, **{weights: without_bias, "x": 2 * inputs["x"]})[0]
    assert torch.equal(2 * once, twice)


LINEAR = Op(
    name="linear",
    larger=resized({"I": INPUTS, "N": OUTPUTS, "T": TOKENS, "B": BATCH}),
    paper="III-A, III-C",
    axes="B T I N",
    reference=linear,
    outputs=("B T N",),
    cases=linear_cases,
    inputs=linear_inputs,
    guarantee=Budget(rows="B T", scale=_linear_scale, exact_on_integers=True),
    properties=(repeats_itself, first_rows_alone("x"), adds_up),
    variants={
        "torch": _torch_linear,
        "sum_of_halves": _sum_of_halves,
        "inputs_shuffled": changed(linear, _inputs_shuffled),
    },
    mutants={
        "bias_dropped": changed(linear, _no_bias),
        "bias_added_twice": changed(linear, _bias_twice),
        "last_input_lost": changed(linear, _last_input_lost),
        "weights_rounded_to_bfloat16": changed(linear, _weights_rounded_to_bfloat16),
        "row_3_percent_off": then(linear, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.B * n.T * n.I * n.N,
    bytes=lambda n: 4 * (n.B * n.T * (n.I + n.N) + n.N * (n.I + 1)),
    fast={Path.COMPILED: fast.LINEAR},
)
