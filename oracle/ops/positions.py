"""Records of the positions that act inside attention: rotate, alibi.

Shapes: B batch, T tokens, S key tokens, H heads, D head size, J pairs.
"""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...reference.positions import alibi, rotate
from ...spec.config import RotaryLayout
from ...spec.decoder import Path
from .. import fast
from ..budget import Budget
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..op import Function, Op
from ..properties import assert_same_bits, call, first_rows_alone, repeats_itself
from ..scale import Known, root
from ..sizes import BATCH, TOKENS, keys_cover_queries, resized
from ..variants import changed, one_row_3_percent_off, then

_PAIRS = {RotaryLayout.HALF_SPLIT: "(pair j)", RotaryLayout.INTERLEAVED: "(j pair)"}


def rotate_cases(pick: Picker) -> Case:
    pairs = pick.integer(1, 6)
    return Case(
        op="rotate",
        sizes={
            "B": pick.integer(1, 2),
            "T": pick.integer(1, 4),
            "H": pick.integer(1, 3),
            "D": 2 * pairs + pick.choice([0, 1, 4]),
            "J": pairs,
        },
        options={
            "layout": pick.choice([layout.value for layout in RotaryLayout]),
            "start": pick.choice([0, 1, 17, 2000, 100_000]),
            "attention_factor": pick.choice([1.0, 1.25]),
            "positions": pick.choice(["range", "jump", "restart"]),
            "base": pick.choice([10_000.0, 500_000.0, 3.0]),
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def _positions(case: Case, tokens: int) -> Tensor:
    """0, 1, 2 and so on; or with gaps of up to 3; or from 0 again half-way, where another sequence starts."""
    position_T = torch.arange(tokens)
    match case.options["positions"]:
        case "jump":
            return position_T + torch.randint(0, 4, (tokens,), generator=case.generator("gaps")).cumsum(0)
        case "restart":
            return position_T % max(1, (tokens + 1) // 2)
    return position_T


def rotate_inputs(case: Case) -> Inputs:
    n, start = case.n, int(case.options["start"] or 0)
    return {
        "x_BTHD": activations(case, "x", n.B, n.T, n.H, n.D),
        "position_T": start + _positions(case, n.T),
        "frequency_J": float(case.options["base"] or 1) ** (-torch.arange(n.J, dtype=torch.float64) / n.J),
        "layout": RotaryLayout(str(case.options["layout"])),
        "attention_factor": case.options["attention_factor"],
    }


def rotate_known(x_BTHD: Known, *turn: Any) -> Known:
    """The turn of the value; beside it, of what is known of it, through the same turn on absolute values."""
    value = rotate(x_BTHD.value, *turn)
    of_sums = rotate_scale(x_BTHD.value.abs(), *turn)
    wide, narrow = (rotate_scale(size, *turn, squares=True) for size in (x_BTHD.wide, x_BTHD.narrow))
    return Known(value, root(of_sums, wide), narrow)


def rotate_scale(
    size_x: Tensor,
    position_T: Tensor,
    frequency_J: Tensor,
    layout: RotaryLayout,
    attention_factor: float,
    *,
    squares: bool = False,
) -> Tensor:
    """The same turn on absolute values, or the root of the sum of their squares."""
    angle_T1J = (position_T[:, None].double() * frequency_J)[:, None]
    size = 2 * len(frequency_J)
    turning, passing = size_x[..., :size], size_x[..., size:]
    first, second = rearrange(turning, f"b t h {_PAIRS[layout]} -> pair b t h j", pair=2)
    cos, sin = abs(attention_factor) * angle_T1J.cos().abs(), abs(attention_factor) * angle_T1J.sin().abs()
    terms = torch.stack([first * cos, first * sin]), torch.stack([second * sin, second * cos])
    turned = root(*terms) if squares else terms[0] + terms[1]
    return torch.cat([rearrange(turned, f"pair b t h j -> b t h {_PAIRS[layout]}"), passing], -1)


def _rotate_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [rotate_scale(exact["x_BTHD"].abs(), **{name: exact[name] for name in exact if name != "x_BTHD"})]


def _complex(
    *, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
) -> Tensor:
    """Pairs as complex numbers, multiplied by exp(i * angle)."""
    angle_T1J = (position_T[:, None] * frequency_J)[:, None]
    turn = torch.polar(torch.full_like(angle_T1J, attention_factor), angle_T1J).to(torch.complex64)
    size = 2 * len(frequency_J)
    pairs = rearrange(x_BTHD[..., :size].float(), f"b t h {_PAIRS[layout]} -> b t h j pair", pair=2).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    turned = rearrange(turned, f"b t h j pair -> b t h {_PAIRS[layout]}")
    return torch.cat([turned.to(x_BTHD.dtype), x_BTHD[..., size:]], -1)


def _with_matrix(
    *, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
) -> Tensor:
    """x * cos + partner(x) * sin, the way it is often written."""
    size = 2 * len(frequency_J)
    turning = x_BTHD[..., :size].float()
    first, second = rearrange(turning, f"b t h {_PAIRS[layout]} -> pair b t h j", pair=2)
    partner = rearrange(torch.stack([-second, first]), f"pair b t h j -> b t h {_PAIRS[layout]}")
    angle_TJ = position_T[:, None] * frequency_J
    both = rearrange(torch.stack([angle_TJ, angle_TJ]), f"pair t j -> t 1 {_PAIRS[layout]}")
    turned = partner * (attention_factor * both.sin()).float() + turning * (attention_factor * both.cos()).float()
    return torch.cat([turned.to(x_BTHD.dtype), x_BTHD[..., size:]], -1)


def _other_layout(inputs: Inputs) -> Inputs:
    return {"layout": next(layout for layout in RotaryLayout if layout is not inputs["layout"])}


def _halves_swapped(inputs: Inputs) -> Inputs:
    size = 2 * len(inputs["frequency_J"])
    first, second, passing = (inputs["x_BTHD"][..., a:b] for a, b in ((0, size // 2), (size // 2, size), (size, None)))
    return {"x_BTHD": torch.cat([second, first, passing], -1)}


def _off_by_one(inputs: Inputs) -> Inputs:
    return {"position_T": inputs["position_T"] + 1}


def _first_position_for_all(inputs: Inputs) -> Inputs:
    return {"position_T": inputs["position_T"][:1].expand_as(inputs["position_T"])}


def _backwards(inputs: Inputs) -> Inputs:
    return {"frequency_J": -inputs["frequency_J"]}


def _float32_angles(
    *, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
) -> Tensor:
    """Angles rounded to float32: harmless at position 10, off by 0.004 radians at 100 000."""
    angle_TJ = position_T[:, None].float() * frequency_J.float()
    one_1 = torch.ones(1)
    tokens = [
        rotate(x_BTHD[:, t : t + 1], one_1, angle_J, layout, attention_factor) for t, angle_J in enumerate(angle_TJ)
    ]
    return torch.cat(tokens, 1)


def _magnitude_forgotten(inputs: Inputs) -> Inputs:
    return {"attention_factor": 1.0}


def _whole_head_stretched(
    *, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
) -> Tensor:
    """The attention_factor multiplies what passes too."""
    return (attention_factor * rotate(x_BTHD, position_T, frequency_J, layout).float()).to(x_BTHD.dtype)


def keeps_lengths(op: Op, function: Function, case: Case) -> None:
    """A turn of attention_factor 1 changes no head's length, beyond rounding."""
    inputs = {**op.inputs(replace(case, dtype=torch.float32, data=Data.NORMAL)), "attention_factor": 1.0}
    before, after = inputs["x_BTHD"].double().norm(dim=-1), function(**inputs).double().norm(dim=-1)
    allowed = 4 * torch.finfo(torch.float32).eps * before
    assert bool(((before - after).abs() <= allowed).all()), f"lengths {before} became {after}"


def products_depend_on_distance_alone(op: Op, function: Function, case: Case) -> None:
    """Moving query and key by the same number of tokens leaves their product, beyond rounding."""
    inputs = op.inputs(replace(case, dtype=torch.float32, data=Data.NORMAL))
    other = replace(case, dtype=torch.float32, data=Data.NORMAL, seed=case.seed + 1)
    query, key = inputs["x_BTHD"], op.inputs(other)["x_BTHD"]

    def product(shift: int) -> Tensor:
        moved = {**inputs, "position_T": inputs["position_T"] + shift, "attention_factor": 1.0}
        turned = function(**{**moved, "x_BTHD": query}).double()
        further = function(**{**moved, "x_BTHD": key, "position_T": moved["position_T"] + 3}).double()
        products: Tensor = (turned * further).sum(-1)
        return products

    allowed = 16 * torch.finfo(torch.float32).eps * query.double().norm(dim=-1) * key.double().norm(dim=-1)
    gap = (product(0) - product(7)).abs()
    assert bool((gap <= allowed).all()), f"products differ by up to {float(gap.max()):.3g}"


def position_zero_is_left_alone(op: Op, function: Function, case: Case) -> None:
    """At position 0 the angle is 0, and with attention_factor 1 no bit changes (but for the sign of zeros)."""
    inputs = op.inputs(case)
    out = call(op, function, case, position_T=torch.zeros_like(inputs["position_T"]), attention_factor=1.0)[0]
    assert_same_bits([out + 0.0], [inputs["x_BTHD"] + 0.0], "position zero")


def _rest_stays(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What does not turn is as wide as it was."""
    return {**after, "D": 2 * after["J"] + before["D"] - 2 * before["J"]}


ROTATE = Op(
    name="rotate",
    larger=resized({"J": (32, 40, 64, 96, 128), "T": TOKENS, "B": BATCH, "H": (8, 16)}, fit=_rest_stays),
    paper="-",
    axes="B T H D J",
    reference=rotate,
    outputs=("B T H D",),
    cases=rotate_cases,
    inputs=rotate_inputs,
    guarantee=Budget(rows="B T H", scale=_rotate_scale),
    properties=(
        repeats_itself,
        first_rows_alone("x_BTHD"),
        keeps_lengths,
        products_depend_on_distance_alone,
        position_zero_is_left_alone,
    ),
    variants={"complex": _complex, "partner": _with_matrix},
    mutants={
        "other_layout": changed(rotate, _other_layout),
        "halves_swapped": changed(rotate, _halves_swapped),
        "position_off_by_one": changed(rotate, _off_by_one),
        "one_position_for_all": changed(rotate, _first_position_for_all),
        "backwards": changed(rotate, _backwards),
        "float32_angles": _float32_angles,
        "magnitude_forgotten": changed(rotate, _magnitude_forgotten),
        "whole_head_stretched": _whole_head_stretched,
        "row_3_percent_off": then(rotate, one_row_3_percent_off),
    },
    flops=lambda n: 6 * n.B * n.T * n.H * n.J,
    bytes=lambda n: 4 * 2 * n.B * n.T * n.H * n.D,
    fast={Path.COMPILED: fast.ROTATE},
    conventions={
        "angles=float32": {
            "reference": _float32_angles,
            "properties": (repeats_itself, first_rows_alone("x_BTHD"), keeps_lengths, position_zero_is_left_alone),
        }
    },
)


def alibi_cases(pick: Picker) -> Case:
    new = pick.integer(1, 5)
    return Case(
        op="alibi",
        sizes={"T": new, "S": new + pick.integer(0, 6), "H": pick.integer(1, 9)},
        options={"start": pick.choice([0, 17, 100_000]), "positions": pick.choice(["range", "jump", "restart"])},
        data=pick.choice(UNMASKED),
        seed=pick.integer(0, 2**31),
    )


def alibi_inputs(case: Case) -> Inputs:
    """Any slopes, not only the published ones."""
    n, start = case.n, int(case.options["start"] or 0)
    position_S = start + _positions(case, n.S)
    return {
        "slope_H": activations(case, "slope", n.H),
        "query_position_T": position_S[n.S - n.T :],
        "key_position_S": position_S,
    }


def _alibi_by_key(*, slope_H: Tensor, query_position_T: Tensor, key_position_S: Tensor) -> Tensor:
    """One pair at a time."""
    pairs = [[s - t for s in key_position_S.tolist()] for t in query_position_T.tolist()]
    return torch.stack([slope * torch.tensor(pairs, dtype=torch.float64) for slope in slope_H]).to(slope_H.dtype)


def _slopes_negated(inputs: Inputs) -> Inputs:
    return {"slope_H": -inputs["slope_H"]}


def _slopes_reversed(inputs: Inputs) -> Inputs:
    return {"slope_H": inputs["slope_H"].flip(0)}


def _one_query_for_all(inputs: Inputs) -> Inputs:
    return {"query_position_T": inputs["query_position_T"][:1].expand_as(inputs["query_position_T"])}


def distances_alone(op: Op, function: Function, case: Case) -> None:
    """Moving every position by the same amount changes nothing."""
    inputs = op.inputs(case)
    moved = {name: value + 64 if value.dtype is torch.int64 else value for name, value in inputs.items()}
    assert_same_bits([function(**inputs)], [function(**moved)], "translation")


ALIBI = Op(
    name="alibi",
    larger=resized({"T": TOKENS, "S": TOKENS, "H": (12, 16, 32)}, fit=keys_cover_queries),
    paper="-",
    axes="T S H",
    reference=alibi,
    outputs=("H T S",),
    cases=alibi_cases,
    inputs=alibi_inputs,
    guarantee=Budget(rows="H T S"),
    properties=(repeats_itself, distances_alone),
    variants={"by_key": _alibi_by_key},
    mutants={
        "sign_flipped": changed(alibi, _slopes_negated),
        "heads_reversed": changed(alibi, _slopes_reversed),
        "one_query_for_all": changed(alibi, _one_query_for_all),
        "in_bfloat16": then(alibi, lambda out: out.to(torch.bfloat16).to(out.dtype)),
    },
    flops=lambda n: 2 * n.H * n.T * n.S,
    bytes=lambda n: 8 * n.H * n.T * n.S,
    fast={Path.COMPILED: fast.ALIBI},
)
