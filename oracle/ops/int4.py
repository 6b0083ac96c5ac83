"""Records of int4 storage: quantize_groups, dequantize_groups, stored_groups.

Shapes: N rows (outputs), I inputs, G groups of a row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...reference.quantize import GroupQuantized, dequantize_groups, quantize_groups, stored
from ...spec.config import INT4_GROUP, Storage
from ...spec.decoder import Path
from .. import fast_quantize as fast
from ..budget import Budget
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..guarantees import Discrete
from ..op import Function, Op
from ..properties import repeats_itself
from ..sizes import INPUTS, OUTPUTS, resized
from ..variants import changed, one_row_3_percent_off, then
from .quantize import numpy_stored


def group_cases(pick: Picker, op: str) -> Case:
    """Rows of up to three groups, the last often short."""
    return Case(
        op=op,
        sizes={"N": pick.integer(1, 4), "I": pick.integer(1, 3 * INT4_GROUP)},
        options={"dtype": pick.choice(["float32", "bfloat16"])} if op == "stored_groups" else {},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def weight(case: Case) -> Tensor:
    """A matrix [N, I]. INTEGER: half-integers of which every group spans exactly 15, so the step is 1, halves ties."""
    n = case.n
    if case.data is not Data.INTEGER:
        return activations(case, "weight", n.N, n.I)
    generator = case.generator("weight")
    halves_NI = torch.randint(0, 31, (n.N, n.I), generator=generator) / 2
    halves_NI[:, 0::INT4_GROUP] = 0
    halves_NI[:, 1::INT4_GROUP] = 15
    low_N1 = torch.randint(-20, 6, (n.N, 1), generator=generator)
    return (halves_NI + low_N1).to(case.dtype)


def quantize_inputs(case: Case) -> Inputs:
    return {"weight_NI": weight(case)}


def _spread(each_NG: Tensor, inputs: int, group: int = INT4_GROUP) -> Tensor:
    """What belongs to a group, [N, G], for each of its inputs, [N, I]."""
    return each_NG.repeat_interleave(group, -1)[:, :inputs]


def _bounds(weight_NI: Tensor, group: int = INT4_GROUP) -> tuple[Tensor, Tensor]:
    """The least and largest weight of each group, [N, G], group after group."""
    pieces = torch.split(weight_NI, group, -1)
    return torch.stack([each.amin(-1) for each in pieces], -1), torch.stack([each.amax(-1) for each in pieces], -1)


def _regret(exact: Inputs, got: list[Tensor]) -> Tensor:
    """How much further from (weight - low) / step each code is than the nearest; infinite for a wrong step or low."""
    weight_NI = exact["weight_NI"]
    quantized_NI, scale_NG, min_NG = (each.double() for each in got)
    true_low_NG, max_NG = _bounds(weight_NI)
    true_step_NG = (max_NG - true_low_NG) / 15
    limits = torch.finfo(torch.float32)
    slack_NG = 2 * limits.eps * true_step_NG.clamp_min(limits.smallest_normal)
    wrong_NG = ((scale_NG - true_step_NG).abs() > slack_NG) | (min_NG != true_low_NG)
    inputs = weight_NI.shape[1]
    divisor_NI = _spread(true_step_NG.where(true_step_NG > 0, 1.0), inputs)
    quotient_NI = (weight_NI - _spread(true_low_NG, inputs)) / divisor_NI
    regret = (quotient_NI - quantized_NI).abs() - (quotient_NI - quotient_NI.round()).abs()
    masked: Tensor = regret.masked_fill(_spread(wrong_NG, inputs) | (quantized_NI > 15), torch.inf)
    return masked


def _quotient_size(exact: Inputs) -> Tensor:
    """The quotient rounds by its size, which is at most 15; a subnormal step has few digits, and theirs count."""
    min_NG, max_NG = _bounds(exact["weight_NI"])
    scale_NG = (max_NG - min_NG) / 15
    size_NG = 15 * (torch.finfo(torch.float32).smallest_normal / scale_NG.where(scale_NG > 0, 1.0)).clamp_min(1.0)
    return _spread(size_NG, exact["weight_NI"].shape[1])


def _quantized(
    weight_NI: Tensor, code: Function = torch.round, steps: float = 15.0, group: int = INT4_GROUP
) -> GroupQuantized:
    weight_NI = weight_NI.float()
    min_NG, max_NG = _bounds(weight_NI, group)
    scale_NG = (max_NG - min_NG) / steps
    inputs = weight_NI.shape[1]
    divisor_NI = _spread(scale_NG.where(scale_NG > 0, torch.inf), inputs, group)
    quantized_NI = code((weight_NI - _spread(min_NG, inputs, group)) / divisor_NI).clamp(0, 15).to(torch.uint8)
    return GroupQuantized(quantized_NI, scale_NG, min_NG)


def _by_scale(*, weight_NI: Tensor) -> GroupQuantized:
    """Multiplying by 15 / (max - min), as ZeRO-Inference does, where that is a normal number."""
    plain = _quantized(weight_NI)
    min_NG, max_NG = _bounds(weight_NI.float())
    safe_NG = max_NG - min_NG > 1e-30
    scale_NG = 15 / (max_NG - min_NG).where(safe_NG, 1.0)
    inputs = weight_NI.shape[1]
    quantized_NI = ((weight_NI.float() - _spread(min_NG, inputs)) * _spread(scale_NG, inputs)).round().clamp(0, 15)
    return GroupQuantized(
        quantized_NI.to(torch.uint8).where(_spread(safe_NG, inputs), plain.quantized_NI),
        (1 / scale_NG).where(safe_NG, plain.scale_NG),
        min_NG,
    )


def _half_away(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


def _groups_of_32(*, weight_NI: Tensor) -> GroupQuantized:
    fine, inputs = _quantized(weight_NI, group=INT4_GROUP // 2), weight_NI.shape[1]
    groups = -(-inputs // INT4_GROUP)
    return GroupQuantized(fine.quantized_NI, fine.scale_NG[:, ::2][:, :groups], fine.min_NG[:, ::2][:, :groups])


def _groups_across_rows(*, weight_NI: Tensor) -> GroupQuantized:
    """Along the flattened matrix, as groups of int8 in the public code are."""
    rows, inputs = weight_NI.shape
    flat = _quantized(weight_NI.reshape(1, -1))
    first_NG = torch.arange(rows)[:, None] * inputs + torch.arange(0, inputs, INT4_GROUP)
    group_NG = first_NG // INT4_GROUP
    return GroupQuantized(flat.quantized_NI.reshape(rows, inputs), flat.scale_NG[0, group_NG], flat.min_NG[0, group_NG])


def _low_dropped(*, weight_NI: Tensor) -> GroupQuantized:
    """Codes count from zero, not from the least weight."""
    right = quantize_groups(weight_NI)
    divisor_NI = _spread(right.scale_NG.where(right.scale_NG > 0, torch.inf), weight_NI.shape[1])
    return replace(right, quantized_NI=(weight_NI.float() / divisor_NI).round().clamp(0, 15).to(torch.uint8))


def codes_follow_powers_of_two(op: Op, function: Function, case: Case) -> None:
    """Doubling a row doubles its steps and lowest values and leaves its codes."""
    weight_NI = op.inputs(replace(case, data=Data.NORMAL, dtype=torch.float32))["weight_NI"]
    once, twice = function(weight_NI=weight_NI), function(weight_NI=2 * weight_NI)
    assert torch.equal(once.quantized_NI, twice.quantized_NI)
    assert torch.equal(2 * once.scale_NG, twice.scale_NG)
    assert torch.equal(2 * once.min_NG, twice.min_NG)


def loses_at_most_half_a_step(op: Op, function: Function, case: Case) -> None:
    """code * step + low is within half a step of the weight (and the rounding of the quotient)."""
    weight_NI = op.inputs(replace(case, dtype=torch.float32))["weight_NI"].double()
    quantized = function(weight_NI=weight_NI.float())
    step_NI, low_NI = (_spread(each.double(), weight_NI.shape[1]) for each in (quantized.scale_NG, quantized.min_NG))
    gap = (weight_NI - quantized.quantized_NI.double() * step_NI - low_NI).abs()
    allowed = (0.5 + 15 * torch.finfo(torch.float32).eps) * step_NI + 15 * 2.0**-149
    assert bool((gap <= allowed).all())


QUANTIZE_GROUPS = Op(
    name="quantize_groups",
    larger=resized({"N": OUTPUTS, "I": INPUTS}),
    paper="III-D (fewer bits)",
    axes="N I",
    reference=quantize_groups,
    outputs=("N I", "N G", "N G"),
    cases=partial(group_cases, op="quantize_groups"),
    inputs=quantize_inputs,
    guarantee=Discrete(regret=_regret, scale=_quotient_size),
    properties=(repeats_itself, codes_follow_powers_of_two, loses_at_most_half_a_step),
    variants={"by_scale": _by_scale, "group_by_group": lambda weight_NI: _quantized(weight_NI)},
    mutants={
        "halves_rounded_up": lambda weight_NI: _quantized(weight_NI, _half_away),
        "truncated": lambda weight_NI: _quantized(weight_NI, torch.trunc),
        "step_of_16_parts": lambda weight_NI: _quantized(weight_NI, steps=16.0),
        "groups_of_32": _groups_of_32,
        "groups_across_rows": _groups_across_rows,
        "low_dropped": _low_dropped,
    },
    flops=lambda n: 4 * n.N * n.I,
    bytes=lambda n: n.N * (4 * n.I + -(-n.I // 2) + 8 * -(-n.I // INT4_GROUP)),
    fast={Path.COMPILED: fast.QUANTIZE_GROUPS},
)


def dequantize_inputs(case: Case) -> Inputs:
    return {"quantized": quantize_groups(weight(case)), "dtype": case.dtype}


def _terms(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    """Both terms round by their own size, and their sum may cancel."""
    quantized: GroupQuantized = exact["quantized"]
    return [dequantize_groups(replace(quantized, min_NG=quantized.min_NG.abs()), torch.float64)]


def _summed_wide(*, quantized: GroupQuantized, dtype: torch.dtype) -> Tensor:
    """As with a fused multiply-add: the product is not rounded."""
    wide = replace(quantized, scale_NG=quantized.scale_NG.double(), min_NG=quantized.min_NG.double())
    return dequantize_groups(wide, torch.float64).to(dtype)


def _by_group(*, quantized: GroupQuantized, dtype: torch.dtype) -> Tensor:
    pieces = torch.split(quantized.quantized_NI, INT4_GROUP, -1)
    terms = zip(pieces, quantized.scale_NG.unbind(-1), quantized.min_NG.unbind(-1), strict=True)
    return torch.cat([low[:, None] + step[:, None] * piece.float() for piece, step, low in terms], -1).to(dtype)


def _with(change: Callable[[GroupQuantized], GroupQuantized]) -> Function:
    return changed(dequantize_groups, lambda inputs: {"quantized": change(inputs["quantized"])})


def _nibbles_swapped(quantized: GroupQuantized) -> GroupQuantized:
    """Bytes read low four bits first: each pair of columns trades places."""
    quantized_NI = quantized.quantized_NI.clone()
    pairs = quantized_NI.shape[1] // 2 * 2
    quantized_NI[:, :pairs] = quantized.quantized_NI[:, :pairs].reshape(len(quantized_NI), -1, 2).flip(-1).flatten(1)
    return replace(quantized, quantized_NI=quantized_NI)


def _read_signed(*, quantized: GroupQuantized, dtype: torch.dtype) -> Tensor:
    """Four bits shifted down with their sign."""
    signed_NI = (quantized.quantized_NI.to(torch.int8) ^ 8) - 8
    return dequantize_groups(replace(quantized, quantized_NI=signed_NI), dtype)


DEQUANTIZE_GROUPS = Op(
    name="dequantize_groups",
    larger=resized({"N": OUTPUTS, "I": INPUTS}),
    paper="III-D (fewer bits)",
    axes="N I",
    reference=dequantize_groups,
    outputs=("N I",),
    cases=partial(group_cases, op="dequantize_groups"),
    inputs=dequantize_inputs,
    guarantee=Budget(rows="N", scale=_terms),
    properties=(repeats_itself,),
    variants={"summed_wide": _summed_wide, "by_group": _by_group},
    mutants={
        "low_dropped": _with(lambda quantized: replace(quantized, min_NG=torch.zeros_like(quantized.min_NG))),
        "another_groups_step": _with(lambda quantized: replace(quantized, scale_NG=quantized.scale_NG.roll(1, -1))),
        "another_rows_low": _with(lambda quantized: replace(quantized, min_NG=quantized.min_NG.roll(1, 0))),
        "nibbles_swapped": _with(_nibbles_swapped),
        "codes_read_signed": _read_signed,
        "row_3_percent_off": then(dequantize_groups, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.N * n.I,
    bytes=lambda n: n.N * (4 * n.I + -(-n.I // 2) + 8 * -(-n.I // INT4_GROUP)),
    fast={Path.COMPILED: fast.DEQUANTIZE_GROUPS},
)


def stored_inputs(case: Case) -> Inputs:
    return {
        "weight_NI": weight(case),
        "storage": Storage.INT4,
        "dtype": getattr(torch, str(case.options.get("dtype", "float32"))),
    }


def _terms_of_stored(exact: Inputs, truth: list[Tensor]) -> list[Tensor]:
    """Return the terms about the least weight, or about the middle: codes from -8 to 7, beside low + 8 * step."""
    kept = quantize_groups(exact["weight_NI"])
    inputs = kept.quantized_NI.shape[1]
    step_NI, center_NI = (_spread(each, inputs).double() for each in (kept.scale_NG, kept.min_NG + 8 * kept.scale_NG))
    about_the_middle = (kept.quantized_NI.double() - 8).abs() * step_NI + center_NI.abs()
    return [torch.maximum(terms, about_the_middle) for terms in _terms({"quantized": kept}, truth)]


def _about_the_middle(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """Codes from -8 to 7 and low + 8 * step in place of low, as a path may hold them: one rounding more."""
    kept = quantize_groups(weight_NI)
    step_NI, center_NI = (
        _spread(each, weight_NI.shape[1]) for each in (kept.scale_NG, kept.min_NG + 8 * kept.scale_NG)
    )
    return ((kept.quantized_NI.float() - 8) * step_NI + center_NI).to(dtype)


def _symmetric(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """Codes about zero, as int8 has them."""
    scale_N1 = weight_NI.float().abs().amax(-1, keepdim=True) / 7
    return ((weight_NI.float() / scale_N1.where(scale_N1 > 0, 1.0)).round() * scale_N1).to(dtype)


def _stored_by(quantize: Function) -> Function:
    def call(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
        return dequantize_groups(quantize(weight_NI=weight_NI), dtype)

    return call


STORED_GROUPS = Op(
    name="stored_groups",
    larger=resized({"N": OUTPUTS, "I": INPUTS}),
    paper="III-D (fewer bits)",
    axes="N I",
    reference=stored,
    outputs=("N I",),
    cases=partial(group_cases, op="stored_groups"),
    inputs=stored_inputs,
    guarantee=Budget(rows="N", scale=_terms_of_stored),
    properties=(repeats_itself,),
    variants={"numpy": numpy_stored, "about_the_middle": _about_the_middle},
    mutants={
        "symmetric": _symmetric,
        "groups_across_rows": _stored_by(_groups_across_rows),
        "low_dropped": _stored_by(_low_dropped),
        "storage_ignored": changed(stored, lambda inputs: {"storage": Storage.FLOAT32}),
    },
    flops=lambda n: 6 * n.N * n.I,
    bytes=lambda n: 4 * 2 * n.N * n.I,
    fast={Path.COMPILED: fast.STORED_GROUPS},
)
