"""The record of rotary positions.

Shapes: B batch, T tokens, H heads, D head size, J pairs.
"""

from dataclasses import replace

import torch
from einops import rearrange
from torch import Tensor

from ..reference.positions import rotate
from ..spec.config import RotaryLayout
from ..spec.decoder import Path
from . import fast
from .budget import Budget
from .case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from .laws import assert_same_bits, call, first_rows_alone, repeats_itself
from .op import Function, Op
from .variants import changed, one_row_3_percent_off, then

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
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def rotate_inputs(case: Case) -> Inputs:
    n, start = case.n, int(case.options["start"] or 0)
    return {
        "x_BTHD": activations(case, "x", n.B, n.T, n.H, n.D),
        "position_T": torch.arange(start, start + n.T),
        "frequency_J": 10000.0 ** (-torch.arange(n.J, dtype=torch.float64) / n.J),
        "layout": RotaryLayout(str(case.options["layout"])),
    }


def rotate_scale(scale_x: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout) -> Tensor:
    """The same turn on absolute values."""
    angle_T1J = (position_T[:, None].double() * frequency_J)[:, None]
    size = 2 * len(frequency_J)
    turning, passing = scale_x[..., :size], scale_x[..., size:]
    first, second = rearrange(turning, f"b t h {_PAIRS[layout]} -> pair b t h j", pair=2)
    cos, sin = angle_T1J.cos().abs(), angle_T1J.sin().abs()
    turned = torch.stack([first * cos + second * sin, first * sin + second * cos])
    return torch.cat([rearrange(turned, f"pair b t h j -> b t h {_PAIRS[layout]}"), passing], -1)


def _rotate_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [rotate_scale(exact["x_BTHD"].abs(), exact["position_T"], exact["frequency_J"], exact["layout"])]


def _complex(*, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout) -> Tensor:
    """Pairs as complex numbers, multiplied by exp(i * angle)."""
    angle_T1J = (position_T[:, None] * frequency_J)[:, None]
    turn = torch.polar(torch.ones_like(angle_T1J), angle_T1J).to(torch.complex64)
    size = 2 * len(frequency_J)
    pairs = rearrange(x_BTHD[..., :size].float(), f"b t h {_PAIRS[layout]} -> b t h j pair", pair=2).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    turned = rearrange(turned, f"b t h j pair -> b t h {_PAIRS[layout]}")
    return torch.cat([turned.to(x_BTHD.dtype), x_BTHD[..., size:]], -1)


def _with_matrix(*, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout) -> Tensor:
    """x * cos + partner(x) * sin, the way it is often written."""
    size = 2 * len(frequency_J)
    turning = x_BTHD[..., :size].float()
    first, second = rearrange(turning, f"b t h {_PAIRS[layout]} -> pair b t h j", pair=2)
    partner = rearrange(torch.stack([-second, first]), f"pair b t h j -> b t h {_PAIRS[layout]}")
    angle_TJ = position_T[:, None] * frequency_J
    both = rearrange(torch.stack([angle_TJ, angle_TJ]), f"pair t j -> t 1 {_PAIRS[layout]}")
    turned = partner * both.sin().float() + turning * both.cos().float()
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


def _float32_angles(*, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout) -> Tensor:
    """Angles rounded to float32: harmless at position 10, off by 0.004 radians at 100 000."""
    angle_TJ = position_T[:, None].float() * frequency_J.float()
    return (
        rotate(x_BTHD, torch.ones(len(position_T)), torch.ones(0), layout)
        if angle_TJ.numel() == 0
        else torch.cat(
            [rotate(x_BTHD[:, t : t + 1], torch.ones(1), angle_TJ[t], layout) for t in range(len(position_T))], 1
        )
    )


def keeps_lengths(op: Op, function: Function, case: Case) -> None:
    """A turn changes no head's length, beyond rounding."""
    inputs = op.inputs(replace(case, dtype=torch.float32, data=Data.NORMAL))
    before, after = inputs["x_BTHD"].double().norm(dim=-1), function(**inputs).double().norm(dim=-1)
    allowed = 4 * torch.finfo(torch.float32).eps * before
    assert bool(((before - after).abs() <= allowed).all()), f"lengths {before} became {after}"


def products_depend_on_distance_alone(op: Op, function: Function, case: Case) -> None:
    """Moving query and key by the same number of tokens leaves their product, beyond rounding."""
    inputs = op.inputs(replace(case, dtype=torch.float32, data=Data.NORMAL))
    other = replace(case, dtype=torch.float32, data=Data.NORMAL, seed=case.seed + 1)
    query, key = inputs["x_BTHD"], op.inputs(other)["x_BTHD"]

    def product(shift: int) -> Tensor:
        moved = {**inputs, "position_T": inputs["position_T"] + shift}
        turned = function(**{**moved, "x_BTHD": query}).double()
        further = function(**{**moved, "x_BTHD": key, "position_T": moved["position_T"] + 3}).double()
        products: Tensor = (turned * further).sum(-1)
        return products

    allowed = 16 * torch.finfo(torch.float32).eps * query.double().norm(dim=-1) * key.double().norm(dim=-1)
    gap = (product(0) - product(7)).abs()
    assert bool((gap <= allowed).all()), f"products differ by up to {float(gap.max()):.3g}"


def position_zero_is_left_alone(op: Op, function: Function, case: Case) -> None:
    """At position 0 the angle is 0, and no bit changes (but for the sign of zeros)."""
    inputs = op.inputs(case)
    out = call(op, function, case, position_T=torch.zeros_like(inputs["position_T"]))[0]
    assert_same_bits([out + 0.0], [inputs["x_BTHD"] + 0.0], "position zero")


ROTATE = Op(
    name="rotate",
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
    right={"complex": _complex, "partner": _with_matrix},
    wrong={
        "other_layout": changed(rotate, _other_layout),
        "halves_swapped": changed(rotate, _halves_swapped),
        "position_off_by_one": changed(rotate, _off_by_one),
        "one_position_for_all": changed(rotate, _first_position_for_all),
        "backwards": changed(rotate, _backwards),
        "float32_angles": _float32_angles,
        "row_3_percent_off": then(rotate, one_row_3_percent_off),
    },
    flops=lambda n: 6 * n.B * n.T * n.H * n.J,
    bytes=lambda n: 4 * 2 * n.B * n.T * n.H * n.D,
    fast={Path.COMPILED: fast.ROTATE},
)
