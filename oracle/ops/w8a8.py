"""Records of the product of 8-bit integers: integer_product, linear_w8a8.

Shapes: B rows of x, I inputs, N outputs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ...reference.quantize import RowQuantized, dequantize_rows, quantize_rows
from ...reference.w8a8 import integer_product, linear_w8a8
from ...spec.decoder import Path
from .. import fast_quantize as fast
from ..budget import Budget, Sizes
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations, parameters
from ..guarantees import Bitwise
from ..op import Function, Op
from ..properties import call, repeats_itself
from ..sizes import INPUTS, OUTPUTS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then


def _sizes(pick: Picker) -> dict[str, int]:
    """Often a few inputs, sometimes more than float32 adds exactly."""
    return {"B": pick.integer(1, 4), "I": pick.integer(1, 50) * pick.choice([1, 1, 50]), "N": pick.integer(1, 9)}


def code_cases(pick: Picker) -> Case:
    return Case(
        op="integer_product",
        sizes=_sizes(pick),
        data=pick.choice((Data.NORMAL, Data.CONSTANT)),
        seed=pick.integer(0, 2**31),
    )


def _codes(case: Case, name: str, rows: int) -> Tensor:
    """Any codes; CONSTANT: rows of 127 or -127, whose sums are the largest."""
    generator = case.generator(name)
    if case.data is Data.CONSTANT:
        sign_N1 = torch.randint(0, 2, (rows, 1), generator=generator) * 2 - 1
        return (127 * sign_N1).expand(rows, case.n.I).to(torch.int8)
    return torch.randint(-127, 128, (rows, case.n.I), generator=generator).to(torch.int8)


def code_inputs(case: Case) -> Inputs:
    return {"quantized_BI": _codes(case, "activation", case.n.B), "quantized_NI": _codes(case, "weight", case.n.N)}


def _in_float64(*, quantized_BI: Tensor, quantized_NI: Tensor) -> Tensor:
    return (quantized_BI.double() @ quantized_NI.double().t()).to(torch.int32)


def _codes_shuffled(inputs: Inputs) -> Inputs:
    order = permutation(inputs["quantized_BI"].shape[1])
    return {name: code[:, order] for name, code in inputs.items()}


def _pairs_saturate(*, quantized_BI: Tensor, quantized_NI: Tensor) -> Tensor:
    """Activations as unsigned bytes, pairs of products added in 16 bits: processors without VNNI instructions."""
    shifted_BI = quantized_BI.int() + 128
    product_BNI = shifted_BI[:, None] * quantized_NI.int()[None]
    product_BNI = torch.nn.functional.pad(product_BNI, (0, quantized_BI.shape[1] % 2))
    pair_BNP = product_BNI[..., 0::2] + product_BNI[..., 1::2]
    sum_BN = pair_BNP.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * quantized_NI.int().sum(-1)
    return sum_BN.to(torch.int32)


def _in_16_bits(*, quantized_BI: Tensor, quantized_NI: Tensor) -> Tensor:
    return integer_product(quantized_BI, quantized_NI).to(torch.int16).to(torch.int32)


def _in_bfloat16(*, quantized_BI: Tensor, quantized_NI: Tensor) -> Tensor:
    """Codes are exact in bfloat16; their sum is not."""
    return (quantized_BI.float() @ quantized_NI.float().t()).bfloat16().to(torch.int32)


def _read_unsigned(inputs: Inputs) -> Inputs:
    return {"quantized_BI": inputs["quantized_BI"].int() & 255}


INTEGER_PRODUCT = Op(
    name="integer_product",
    larger=resized({"I": INPUTS, "N": OUTPUTS, "B": (5, 16, 17, 33)}),
    paper="III-D (INT8)",
    axes="B I N",
    reference=integer_product,
    outputs=("B N",),
    cases=code_cases,
    inputs=code_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself,),
    variants={"in_float64": _in_float64, "codes_shuffled": changed(integer_product, _codes_shuffled)},
    mutants={
        "pairs_saturate": _pairs_saturate,
        "summed_in_16_bits": _in_16_bits,
        "summed_in_bfloat16": _in_bfloat16,
        "activations_read_unsigned": changed(integer_product, _read_unsigned),
    },
    flops=lambda n: 2 * n.B * n.I * n.N,
    bytes=lambda n: (n.B + n.N) * n.I + 4 * n.B * n.N,
    fast={Path.COMPILED: fast.INTEGER_PRODUCT},
)


def product_cases(pick: Picker) -> Case:
    return Case(
        op="linear_w8a8",
        sizes=_sizes(pick),
        options={"bias": pick.choice([False, True])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def product_inputs(case: Case) -> Inputs:
    """INTEGER: half-integers whose rows reach exactly 127, so that the scale is 1 and halves are ties, to even."""
    n = case.n
    x_BI = activations(case, "x", n.B, n.I)
    if case.data is Data.INTEGER:
        x_BI = (torch.randint(-253, 254, (n.B, n.I), generator=case.generator("x")) / 2).to(case.dtype)
        x_BI[:, 0] = 127
    return {
        "x": x_BI,
        "weights": quantize_rows(parameters(case, "weight", n.N, n.I)),
        "bias_N": parameters(case, "bias", n.N) if case.options["bias"] else None,
    }


def _sum_and_bias(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    """The sum is exact: what rounds is the sum times its scales, and the bias added to it."""
    x_BI, weights = exact["x"], exact["weights"]
    size_BN = linear_w8a8(x_BI, weights).abs()
    wide = size_BN if exact["bias_N"] is None else size_BN + exact["bias_N"].abs()
    return [Sizes(wide, jump=_near_ties(x_BI) @ dequantize_rows(weights, torch.float64).abs().t())]


def _near_ties(x_BI: Tensor) -> Tensor:
    """The step of each activation whose quotient is so near a half that float32 may round it either way.

    The scale rounds and so does the quotient, or its reciprocal and their product; a subnormal scale has few digits.
    By a power of two nothing rounds, and a tie goes to the even code.
    """
    limits = torch.finfo(torch.float32)
    scale_B1 = x_BI.abs().amax(-1, keepdim=True) / 127
    quotient_BI = x_BI / scale_B1.where(scale_B1 > 0, 1.0)
    digits_B1 = limits.eps * (limits.smallest_normal / scale_B1.where(scale_B1 > 0, 1.0)).clamp_min(1.0)
    from_tie_BI = ((quotient_BI - quotient_BI.floor()) - 0.5).abs()
    rounds_B1 = torch.frexp(scale_B1.float()).mantissa != 0.5
    return scale_B1 * (rounds_B1 & (from_tie_BI <= 2 * digits_B1 * quotient_BI.abs()))


def _sum(x: Tensor, weights: RowQuantized) -> tuple[Tensor, Tensor]:
    row = quantize_rows(x)
    return integer_product(row.quantized_NI, weights.quantized_NI).float(), row.scale_N


def _with_bias(out_BN: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (out_BN if bias_N is None else out_BN + bias_N.float()).to(dtype)


def _weights_scale_first(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    sum_BN, scale_B = _sum(x, weights)
    return _with_bias(sum_BN * weights.scale_N * scale_B[:, None], bias_N, x.dtype)


def _both_halves(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    """Half of the inputs after the other, scaled alone and added in float64: as ranks that share a row's scale do."""
    row, half = quantize_rows(x), x.shape[1] // 2
    sums = [
        integer_product(row.quantized_NI[:, part], weights.quantized_NI[:, part])
        for part in (slice(half), slice(half, None))
    ]
    scale_BN = row.scale_N.double()[:, None] * weights.scale_N.double()
    return _with_bias((sums[0] * scale_BN + sums[1] * scale_BN).float(), bias_N, x.dtype)


def _one_scale_for_all_rows(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    scale = x.float().abs().amax() / 127
    quantized_BI = (x.float() / scale.where(scale > 0, 1.0)).round().to(torch.int8)
    return _with_bias(integer_product(quantized_BI, weights.quantized_NI) * scale * weights.scale_N, bias_N, x.dtype)


def _activations_as_they_are(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    return _with_bias(x.float() @ dequantize_rows(weights, torch.float32).t(), bias_N, x.dtype)


def _halves_rounded_up(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    scale_B = quantize_rows(x).scale_N
    quotient_BI = x.float() / scale_B.where(scale_B > 0, 1.0)[:, None]
    sum_BN = integer_product((quotient_BI + 0.5).floor().clamp(-127, 127).to(torch.int8), weights.quantized_NI)
    return _with_bias(sum_BN.float() * scale_B[:, None] * weights.scale_N, bias_N, x.dtype)


def _bias_scaled(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    """The bias is added to the sum, before the scales."""
    sum_BN, scale_B = _sum(x, weights)
    return (_with_bias(sum_BN, bias_N, torch.float32) * scale_B[:, None] * weights.scale_N).to(x.dtype)


def _another_rows_scale(*, x: Tensor, weights: RowQuantized, bias_N: Tensor | None) -> Tensor:
    sum_BN, scale_B = _sum(x, weights)
    return _with_bias(sum_BN * scale_B.roll(1)[:, None] * weights.scale_N, bias_N, x.dtype)


def stays_within_half_a_step(op: Op, function: Function, case: Case) -> None:
    """Of the product with x as it is: half an activation's step times the sum of the weights' magnitudes."""
    whole = replace(case, dtype=torch.float32)
    inputs = op.inputs(whole)
    weight_NI = dequantize_rows(inputs["weights"], torch.float64)
    exact_BN = inputs["x"].double() @ weight_NI.t()
    (out_BN,) = call(op, function, whole, bias_N=None)
    limits = torch.finfo(torch.float32)
    scale_B1 = quantize_rows(inputs["x"]).scale_N.double()[:, None]
    step_B1 = (0.5 + 127 * limits.eps) * scale_B1 + 127 * limits.smallest_normal * limits.eps  # of a denormal scale
    allowed_BN = step_B1 * weight_NI.abs().sum(-1) + 4 * limits.eps * out_BN.double().abs() + limits.smallest_normal
    assert bool(((out_BN.double() - exact_BN).abs() <= allowed_BN).all())


def follows_powers_of_two(op: Op, function: Function, case: Case) -> None:
    """Twice x gives twice the result, without a bias."""
    whole = replace(case, data=Data.NORMAL, dtype=torch.float32)
    once = call(op, function, whole, bias_N=None)[0]
    twice = call(op, function, whole, bias_N=None, x=2 * op.inputs(whole)["x"])[0]
    assert torch.equal(2 * once, twice)


LINEAR_W8A8 = Op(
    name="linear_w8a8",
    larger=resized({"I": INPUTS, "N": OUTPUTS, "B": (5, 16, 17, 33)}),
    paper="III-D (INT8)",
    axes="B I N",
    reference=linear_w8a8,
    outputs=("B N",),
    cases=product_cases,
    inputs=product_inputs,
    guarantee=Budget(rows="B", scale=_sum_and_bias),
    properties=(repeats_itself, follows_powers_of_two, stays_within_half_a_step),
    variants={"weights_scale_first": _weights_scale_first, "both_halves": _both_halves},
    mutants={
        "one_scale_for_all_rows": _one_scale_for_all_rows,
        "activations_as_they_are": _activations_as_they_are,
        "halves_rounded_up": _halves_rounded_up,
        "bias_scaled": _bias_scaled,
        "another_rows_scale": _another_rows_scale,
        "row_3_percent_off": then(linear_w8a8, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.B * n.I * n.N + 3 * n.B * (n.I + n.N),
    bytes=lambda n: 4 * n.B * (n.I + n.N) + n.N * (n.I + 8),
    fast={Path.COMPILED: fast.LINEAR_W8A8},
)
