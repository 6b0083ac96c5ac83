"""Records of int4 storage: quantise_groups, dequantise_groups, stored_groups.

Shapes: N rows (outputs), I inputs, G groups of a row.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..reference.quantise import GroupQuantised, dequantise_groups, quantise_groups, stored
from ..spec.config import INT4_GROUP, Storage
from ..spec.decoder import Path
from . import fast_quantise as fast
from .budget import Budget
from .case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from .guarantees import Discrete
from .laws import repeats_itself
from .op import Function, Op
from .quantise_ops import numpy_stored
from .variants import changed, one_row_3_percent_off, then


def group_cases(pick: Picker, op: str) -> Case:
    """Rows of up to three groups, the last often short."""
    return Case(
        op=op,
        sizes={"N": pick.integer(1, 4), "I": pick.integer(1, 3 * INT4_GROUP)},
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


def quantise_inputs(case: Case) -> Inputs:
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
    code_NI, step_NG, low_NG = (each.double() for each in got)
    true_low_NG, high_NG = _bounds(weight_NI)
    true_step_NG = (high_NG - true_low_NG) / 15
    limits = torch.finfo(torch.float32)
    slack_NG = 2 * limits.eps * true_step_NG.clamp_min(limits.smallest_normal)
    wrong_NG = ((step_NG - true_step_NG).abs() > slack_NG) | (low_NG != true_low_NG)
    inputs = weight_NI.shape[1]
    divisor_NI = _spread(true_step_NG.where(true_step_NG > 0, 1.0), inputs)
    quotient_NI = (weight_NI - _spread(true_low_NG, inputs)) / divisor_NI
    regret = (quotient_NI - code_NI).abs() - (quotient_NI - quotient_NI.round()).abs()
    masked: Tensor = regret.masked_fill(_spread(wrong_NG, inputs) | (code_NI > 15), torch.inf)
    return masked


def _quotient_size(exact: Inputs) -> Tensor:
    """The quotient rounds by its size, which is at most 15; a subnormal step has few digits, and theirs count."""
    low_NG, high_NG = _bounds(exact["weight_NI"])
    step_NG = (high_NG - low_NG) / 15
    size_NG = 15 * (torch.finfo(torch.float32).smallest_normal / step_NG.where(step_NG > 0, 1.0)).clamp_min(1.0)
    return _spread(size_NG, exact["weight_NI"].shape[1])


def _quantised(
    weight_NI: Tensor, code: Function = torch.round, steps: float = 15.0, group: int = INT4_GROUP
) -> GroupQuantised:
    weight_NI = weight_NI.float()
    low_NG, high_NG = _bounds(weight_NI, group)
    step_NG = (high_NG - low_NG) / steps
    inputs = weight_NI.shape[1]
    divisor_NI = _spread(step_NG.where(step_NG > 0, torch.inf), inputs, group)
    code_NI = code((weight_NI - _spread(low_NG, inputs, group)) / divisor_NI).clamp(0, 15).to(torch.uint8)
    return GroupQuantised(code_NI, step_NG, low_NG)


def _by_scale(*, weight_NI: Tensor) -> GroupQuantised:
    """Multiplying by 15 / (max - min), as ZeRO-Inference does, where that is a normal number."""
    plain = _quantised(weight_NI)
    low_NG, high_NG = _bounds(weight_NI.float())
    safe_NG = high_NG - low_NG > 1e-30
    scale_NG = 15 / (high_NG - low_NG).where(safe_NG, 1.0)
    inputs = weight_NI.shape[1]
    code_NI = ((weight_NI.float() - _spread(low_NG, inputs)) * _spread(scale_NG, inputs)).round().clamp(0, 15)
    return GroupQuantised(
        code_NI.to(torch.uint8).where(_spread(safe_NG, inputs), plain.code_NI),
        (1 / scale_NG).where(safe_NG, plain.step_NG),
        low_NG,
    )


def _half_away(x: Tensor) -> Tensor:
    return torch.floor(x + 0.5)


def _groups_of_32(*, weight_NI: Tensor) -> GroupQuantised:
    fine, inputs = _quantised(weight_NI, group=INT4_GROUP // 2), weight_NI.shape[1]
    groups = -(-inputs // INT4_GROUP)
    return GroupQuantised(fine.code_NI, fine.step_NG[:, ::2][:, :groups], fine.low_NG[:, ::2][:, :groups])


def _groups_across_rows(*, weight_NI: Tensor) -> GroupQuantised:
    """Along the flattened matrix, as groups of int8 in the public code are."""
    rows, inputs = weight_NI.shape
    flat = _quantised(weight_NI.reshape(1, -1))
    first_NG = torch.arange(rows)[:, None] * inputs + torch.arange(0, inputs, INT4_GROUP)
    group_NG = first_NG // INT4_GROUP
    return GroupQuantised(flat.code_NI.reshape(rows, inputs), flat.step_NG[0, group_NG], flat.low_NG[0, group_NG])


def _low_dropped(*, weight_NI: Tensor) -> GroupQuantised:
    """Codes count from zero, not from the least weight."""
    right = quantise_groups(weight_NI)
    divisor_NI = _spread(right.step_NG.where(right.step_NG > 0, torch.inf), weight_NI.shape[1])
    return replace(right, code_NI=(weight_NI.float() / divisor_NI).round().clamp(0, 15).to(torch.uint8))


def codes_follow_powers_of_two(op: Op, function: Function, case: Case) -> None:
    """Doubling a row doubles its steps and lowest values and leaves its codes."""
    weight_NI = op.inputs(replace(case, data=Data.NORMAL, dtype=torch.float32))["weight_NI"]
    once, twice = function(weight_NI=weight_NI), function(weight_NI=2 * weight_NI)
    assert torch.equal(once.code_NI, twice.code_NI)
    assert torch.equal(2 * once.step_NG, twice.step_NG)
    assert torch.equal(2 * once.low_NG, twice.low_NG)


def loses_at_most_half_a_step(op: Op, function: Function, case: Case) -> None:
    """code * step + low is within half a step of the weight (and the rounding of the quotient)."""
    weight_NI = op.inputs(replace(case, dtype=torch.float32))["weight_NI"].double()
    quantised = function(weight_NI=weight_NI.float())
    step_NI, low_NI = (_spread(each.double(), weight_NI.shape[1]) for each in (quantised.step_NG, quantised.low_NG))
    gap = (weight_NI - quantised.code_NI.double() * step_NI - low_NI).abs()
    allowed = (0.5 + 15 * torch.finfo(torch.float32).eps) * step_NI + 15 * 2.0**-149
    assert bool((gap <= allowed).all())


QUANTISE_GROUPS = Op(
    name="quantise_groups",
    paper="III-D (fewer bits)",
    axes="N I",
    reference=quantise_groups,
    outputs=("N I", "N G", "N G"),
    cases=partial(group_cases, op="quantise_groups"),
    inputs=quantise_inputs,
    guarantee=Discrete(regret=_regret, scale=_quotient_size),
    properties=(repeats_itself, codes_follow_powers_of_two, loses_at_most_half_a_step),
    right={"by_scale": _by_scale, "group_by_group": lambda weight_NI: _quantised(weight_NI)},
    wrong={
        "halves_rounded_up": lambda weight_NI: _quantised(weight_NI, _half_away),
        "truncated": lambda weight_NI: _quantised(weight_NI, torch.trunc),
        "step_of_16_parts": lambda weight_NI: _quantised(weight_NI, steps=16.0),
        "groups_of_32": _groups_of_32,
        "groups_across_rows": _groups_across_rows,
        "low_dropped": _low_dropped,
    },
    flops=lambda n: 4 * n.N * n.I,
    bytes=lambda n: n.N * (4 * n.I + -(-n.I // 2) + 8 * -(-n.I // INT4_GROUP)),
    fast={Path.COMPILED: fast.QUANTISE_GROUPS},
)


def dequantise_inputs(case: Case) -> Inputs:
    return {"quantised": quantise_groups(weight(case)), "dtype": case.dtype}


def _terms(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    """Both terms round by their own size, and their sum may cancel."""
    quantised: GroupQuantised = exact["quantised"]
    return [dequantise_groups(replace(quantised, low_NG=quantised.low_NG.abs()), torch.float64)]


def _summed_wide(*, quantised: GroupQuantised, dtype: torch.dtype) -> Tensor:
    """As with a fused multiply-add: the product is not rounded."""
    wide = replace(quantised, step_NG=quantised.step_NG.double(), low_NG=quantised.low_NG.double())
    return dequantise_groups(wide, torch.float64).to(dtype)


def _by_group(*, quantised: GroupQuantised, dtype: torch.dtype) -> Tensor:
    pieces = torch.split(quantised.code_NI, INT4_GROUP, -1)
    terms = zip(pieces, quantised.step_NG.unbind(-1), quantised.low_NG.unbind(-1), strict=True)
    return torch.cat([low[:, None] + step[:, None] * piece.float() for piece, step, low in terms], -1).to(dtype)


def _with(change: Callable[[GroupQuantised], GroupQuantised]) -> Function:
    return changed(dequantise_groups, lambda inputs: {"quantised": change(inputs["quantised"])})


def _nibbles_swapped(quantised: GroupQuantised) -> GroupQuantised:
    """Bytes read low four bits first: each pair of columns trades places."""
    code_NI = quantised.code_NI.clone()
    pairs = code_NI.shape[1] // 2 * 2
    code_NI[:, :pairs] = quantised.code_NI[:, :pairs].reshape(len(code_NI), -1, 2).flip(-1).flatten(1)
    return replace(quantised, code_NI=code_NI)


def _read_signed(*, quantised: GroupQuantised, dtype: torch.dtype) -> Tensor:
    """Four bits shifted down with their sign."""
    signed_NI = (quantised.code_NI.to(torch.int8) ^ 8) - 8
    return dequantise_groups(replace(quantised, code_NI=signed_NI), dtype)


DEQUANTISE_GROUPS = Op(
    name="dequantise_groups",
    paper="III-D (fewer bits)",
    axes="N I",
    reference=dequantise_groups,
    outputs=("N I",),
    cases=partial(group_cases, op="dequantise_groups"),
    inputs=dequantise_inputs,
    guarantee=Budget(rows="N", scale=_terms),
    properties=(repeats_itself,),
    right={"summed_wide": _summed_wide, "by_group": _by_group},
    wrong={
        "low_dropped": _with(lambda quantised: replace(quantised, low_NG=torch.zeros_like(quantised.low_NG))),
        "another_groups_step": _with(lambda quantised: replace(quantised, step_NG=quantised.step_NG.roll(1, -1))),
        "another_rows_low": _with(lambda quantised: replace(quantised, low_NG=quantised.low_NG.roll(1, 0))),
        "nibbles_swapped": _with(_nibbles_swapped),
        "codes_read_signed": _read_signed,
        "row_3_percent_off": then(dequantise_groups, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.N * n.I,
    bytes=lambda n: n.N * (4 * n.I + -(-n.I // 2) + 8 * -(-n.I // INT4_GROUP)),
    fast={Path.COMPILED: fast.DEQUANTISE_GROUPS},
)


def stored_inputs(case: Case) -> Inputs:
    return {"weight_NI": weight(case), "storage": Storage.INT4, "dtype": torch.float32}


def _terms_of_stored(exact: Inputs, truth: list[Tensor]) -> list[Tensor]:
    return _terms({"quantised": quantise_groups(exact["weight_NI"])}, truth)


def _about_the_middle(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """Codes from -8 to 7 and low + 8 * step in place of low, as a path may hold them: one rounding more."""
    kept = quantise_groups(weight_NI)
    step_NI, centre_NI = (_spread(each, weight_NI.shape[1]) for each in (kept.step_NG, kept.low_NG + 8 * kept.step_NG))
    return ((kept.code_NI.float() - 8) * step_NI + centre_NI).to(dtype)


def _symmetric(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """Codes about zero, as int8 has them."""
    scale_N1 = weight_NI.float().abs().amax(-1, keepdim=True) / 7
    return ((weight_NI.float() / scale_N1.where(scale_N1 > 0, 1.0)).round() * scale_N1).to(dtype)


def _stored_by(quantise: Function) -> Function:
    def call(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
        return dequantise_groups(quantise(weight_NI=weight_NI), dtype)

    return call


STORED_GROUPS = Op(
    name="stored_groups",
    paper="III-D (fewer bits)",
    axes="N I",
    reference=stored,
    outputs=("N I",),
    cases=partial(group_cases, op="stored_groups"),
    inputs=stored_inputs,
    guarantee=Budget(rows="N", scale=_terms_of_stored),
    properties=(repeats_itself,),
    right={"numpy": numpy_stored, "about_the_middle": _about_the_middle},
    wrong={
        "symmetric": _symmetric,
        "groups_across_rows": _stored_by(_groups_across_rows),
        "low_dropped": _stored_by(_low_dropped),
        "storage_ignored": changed(stored, lambda inputs: {"storage": Storage.FLOAT32}),
    },
    flops=lambda n: 6 * n.N * n.I,
    bytes=lambda n: 4 * 2 * n.N * n.I,
    fast={Path.COMPILED: fast.STORED_GROUPS},
)
