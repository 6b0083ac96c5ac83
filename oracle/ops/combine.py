"""The record of the weighted sum of what experts return: combine.

Shapes: T tokens, K = top_k, E experts, C capacity, S = E * C slots, M hidden.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...reference import dispatch as reference
from ...reference.dispatch import DROPPED, combine
from ...spec.decoder import Path
from .. import fast_moe as fast
from ..budget import Budget
from ..case import Case, Inputs, Picker, activations
from ..op import Function, Op
from ..properties import call, repeats_itself
from ..sizes import HIDDEN, TOKENS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then
from .dispatch import EXPERTS, dispatch_inputs, dispatched, drawn_routing


def combine_cases(pick: Picker) -> Case:
    return drawn_routing(pick, "combine")


def combine_inputs(case: Case) -> Inputs:
    given = dispatch_inputs(case)
    out = dispatched(**given)
    return {
        "out_ECM": activations(case, "served", *out.x_ECM.shape),
        "slot_TK": out.slot_TK,
        "weight_TK": given["weight_TK"],
    }


def _combine_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [combine(exact["out_ECM"].abs(), exact["slot_TK"], exact["weight_TK"].abs())]


def _one_hot(*, out_ECM: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    mask_TKEC = reference.slot_mask(slot_TK, *out_ECM.shape[:2])
    return reference.combine_one_hot(out_ECM, mask_TKEC, weight_TK)


def _added_slot_by_slot(*, out_ECM: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Slots added to their tokens, the last first."""
    out_TM = torch.zeros(len(slot_TK), out_ECM.shape[2])
    out_SM = out_ECM.flatten(0, 1).float()
    for choice in reversed(range(slot_TK.shape[1])):
        served_T = slot_TK[:, choice] != DROPPED
        out_TM[served_T] += out_SM[slot_TK[served_T, choice]] * weight_TK[served_T, choice, None]
    return out_TM


def _weights_of_next_choice(inputs: Inputs) -> Inputs:
    return {"weight_TK": inputs["weight_TK"].roll(1, -1)}


def _dropped_renormalized(inputs: Inputs) -> Inputs:
    """The weights of what was dropped are spread over what was served."""
    weight_TK, served_TK = inputs["weight_TK"], inputs["slot_TK"] != DROPPED
    left_T1 = (weight_TK * served_TK).sum(-1, keepdim=True)
    return {"weight_TK": weight_TK * weight_TK.sum(-1, keepdim=True) / left_T1.where(left_T1 > 0, 1.0)}


def _dropped_from_slot(slot: int) -> Callable[[Inputs], Inputs]:
    def change(inputs: Inputs) -> Inputs:
        count = inputs["out_ECM"].shape[0] * inputs["out_ECM"].shape[1]
        return {"slot_TK": inputs["slot_TK"].where(inputs["slot_TK"] != DROPPED, slot % max(count, 1))}

    return change


def _weights_in(dtype: torch.dtype) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {"weight_TK": inputs["weight_TK"].to(dtype).float()}


def _places_first(inputs: Inputs) -> Inputs:
    """Slots read as place * E + expert."""
    out_ECM = inputs["out_ECM"]
    return {"out_ECM": out_ECM.transpose(0, 1).reshape(out_ECM.shape)}


def _sum_in(dtype: torch.dtype) -> Function:
    def wrong(*, out_ECM: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return combine(out_ECM.to(dtype), slot_TK, weight_TK.to(dtype)).float()

    return wrong


def permuting_tokens_permutes_rows(op: Op, function: Function, case: Case) -> None:
    """Tokens in another order, with their slots and weights, come out in that order."""
    inputs = op.inputs(case)
    order = permutation(case.n.T)
    before = call(op, function, case)
    after = call(op, function, case, slot_TK=inputs["slot_TK"][order], weight_TK=inputs["weight_TK"][order])
    gap = (after[0].double() - before[0][order].double()).abs()
    allowed = 4 * torch.finfo(torch.float32).eps * _combine_scale(_exact(inputs), [])[0][order]
    assert bool((gap <= allowed.clamp_min(torch.finfo(torch.float32).smallest_normal)).all())


def _exact(inputs: Inputs) -> Inputs:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def what_was_dropped_adds_nothing(op: Op, function: Function, case: Case) -> None:
    """A token without a slot gets zeros, even where every slot holds NaN."""
    inputs = op.inputs(replace(case, options={**case.options, "factor": 0.25, "minimum": 1}))
    slot_TK = inputs["slot_TK"].clone()
    slot_TK[-1] = DROPPED
    out_TM = function(**{**inputs, "slot_TK": slot_TK, "out_ECM": torch.full_like(inputs["out_ECM"], torch.nan)})
    assert bool((out_TM[(slot_TK == DROPPED).all(-1)] == 0).all()), "a token without a slot is not given zeros"


COMBINE = Op(
    name="combine",
    larger=resized({"T": TOKENS, "E": EXPERTS, "M": HIDDEN}),
    paper="V-C",
    axes="T K E M",
    reference=combine,
    outputs=("T M",),
    cases=combine_cases,
    inputs=combine_inputs,
    guarantee=Budget(rows="T", scale=_combine_scale, exact_on_integers=True),
    properties=(repeats_itself, permuting_tokens_permutes_rows),
    conventions={
        "unseen=nan": {
            "properties": (repeats_itself, permuting_tokens_permutes_rows, what_was_dropped_adds_nothing),
        }
    },
    variants={"one_hot": _one_hot, "slot_by_slot": _added_slot_by_slot},
    mutants={
        "weights_forgotten": changed(combine, lambda inputs: {"weight_TK": torch.ones_like(inputs["weight_TK"])}),
        "weights_of_the_next_choice": changed(combine, _weights_of_next_choice),
        "dropped_weights_spread": changed(combine, _dropped_renormalized),
        "dropped_from_the_first_slot": changed(combine, _dropped_from_slot(0)),
        "dropped_from_the_last_slot": changed(combine, _dropped_from_slot(-1)),
        "places_before_experts": changed(combine, _places_first),
        "first_choice_only": changed(
            combine,
            lambda inputs: {"slot_TK": inputs["slot_TK"][:, :1], "weight_TK": inputs["weight_TK"][:, :1]},
        ),
        "bfloat16_weights": changed(combine, _weights_in(torch.bfloat16)),
        "bfloat16_sum": _sum_in(torch.bfloat16),
        "row_3_percent_off": then(combine, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.T * n.K * n.M,
    bytes=lambda n: 4 * n.T * (n.K + 1) * n.M + 12 * n.T * n.K,
    fast={Path.COMPILED: fast.COMBINE},
)
