"""Records of weight storage: quantize_rows, dequantize_rows, stored.

Shapes: N rows (outputs), I inputs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...reference.quantize import RowQuantized, dequantize_rows, quantize_rows, stored
from ...spec.config import Storage
from ...spec.decoder import Path
from .. import fast_quantize as fast
from ..budget import Budget
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..guarantees import Bitwise, Discrete
from ..op import Function, Op
from ..properties import repeats_itself
from ..sizes import INPUTS, OUTPUTS, resized
from ..variants import changed, one_row_3_percent_off, then

BIT_FOR_BIT = [kind.value for kind in Storage if kind is not Storage.INT4]
"""What a fast path must give back bit by bit; int4 has a record of its own, `stored_groups`."""


STORED_AS = ("float32", "float64")
"""What it is given back in: where code * scale is exact, and where it rounds once."""


def matrix_cases(pick: Picker, op: str) -> Case:
    return Case(
        op=op,
        sizes={"N": pick.integer(1, 6), "I": pick.integer(1, 20)},
        options={"storage": pick.choice(BIT_FOR_BIT), "dtype": pick.choice(STORED_AS)} if op == "stored" else {},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES) if op != "stored" else torch.float32,
        seed=pick.integer(0, 2**31),
    )


def weight(case: Case) -> Tensor:
    """A matrix [N, I]. INTEGER: half-integers whose rows reach exactly 127, so the scale is 1 and halves are ties."""
    n = case.n
    if case.data is not Data.INTEGER:
        return activations(case, "weight", n.N, n.I)
    halves_NI = torch.randint(-253, 254, (n.N, n.I), generator=case.generator("weight")).to(case.dtype) / 2
    halves_NI[:, 0] = 127
    return halves_NI


def quantize_inputs(case: Case) -> Inputs:
    return {"weight_NI": weight(case)}


def _regret(exact: Inputs, got: list[Tensor]) -> Tensor:
    """How much further from weight / scale each code is than the nearest; infinite for codes without a right scale."""
    quantized_NI, scale_N = got[0].double(), got[1].double()
    true_scale_N = exact["weight_NI"].abs().amax(-1) / 127
    quotient_NI = exact["weight_NI"] / true_scale_N.where(true_scale_N > 0, 1.0)[:, None]
    limits = torch.finfo(torch.float32)
    slack_N = 2 * limits.eps * true_scale_N.clamp_min(limits.smallest_normal)
    wrong_scale_N1 = ((scale_N - true_scale_N).abs() > slack_N)[:, None]
    out_of_range = quantized_NI.abs() > 127
    regret = (quotient_NI - quantized_NI).abs() - (quotient_NI - quotient_NI.round()).abs()
    masked: Tensor = regret.masked_fill(wrong_scale_N1 | out_of_range, torch.inf)
    return masked


def _quotient_size(exact: Inputs) -> Tensor:
    """The quotient rounds by its size, which is at most 127; a subnormal scale has few digits, and theirs count."""
    scale_N1 = exact["weight_NI"].abs().amax(-1, keepdim=True) / 127
    limits = torch.finfo(torch.float32)
    size: Tensor = 127 * (limits.smallest_normal / scale_N1.where(scale_N1 > 0, 1.0)).clamp_min(1.0)
    return size


def _reciprocal(*, weight_NI: Tensor) -> RowQuantized:
    """Multiplying by 127 / max instead of dividing by the scale, where that is a normal number."""
    weight_NI = weight_NI.float()
    peak_N = weight_NI.abs().amax(-1)
    scale_N = peak_N / 127
    safe_N = peak_N > 1e-30
    inverse_N = torch.where(safe_N, 127 / peak_N.where(safe_N, 1.0), 0.0)
    quantized_NI = torch.where(
        safe_N[:, None], weight_NI * inverse_N[:, None], weight_NI / scale_N.where(scale_N > 0, 1.0)[:, None]
    )
    return RowQuantized(quantized_NI.round().clamp(-127, 127).to(torch.int8), scale_N)


def _quantized(weight_NI: Tensor, code: Function, steps: float = 127.0, whole: bool = False) -> RowQuantized:
    weight_NI = weight_NI.float()
    peak_N = weight_NI.abs().amax(-1)
    if whole:
        peak_N = peak_N.amax().expand_as(peak_N)
    scale_N = peak_N / steps
    quotient_NI = weight_NI / scale_N.where(scale_N > 0, 1.0)[:, None]
    return RowQuantized(code(quotient_NI).clamp(-128, 127).to(torch.int8), scale_N.clone())


def _half_away(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def codes_follow_powers_of_two(op: Op, function: Function, case: Case) -> None:
    """Doubling a row doubles its scale and leaves its codes; negating it negates the codes."""
    weight_NI = op.inputs(replace(case, data=Data.NORMAL, dtype=torch.float32))["weight_NI"]
    once, twice, negated = (function(weight_NI=w) for w in (weight_NI, 2 * weight_NI, -weight_NI))
    assert torch.equal(once.quantized_NI, twice.quantized_NI)
    assert torch.equal(2 * once.scale_N, twice.scale_N)
    assert torch.equal(once.quantized_NI, -negated.quantized_NI)


def loses_at_most_half_a_step(op: Op, function: Function, case: Case) -> None:
    """code * scale is within half a scale of the weight (and the rounding of the quotient)."""
    weight_NI = op.inputs(replace(case, dtype=torch.float32))["weight_NI"].double()
    quantized = function(weight_NI=weight_NI.float())
    gap = (weight_NI - quantized.quantized_NI.double() * quantized.scale_N.double()[:, None]).abs()
    eps = torch.finfo(torch.float32).eps
    allowed = (0.5 + 127 * eps) * quantized.scale_N.double()[:, None] + 127 * 2.0**-149
    assert bool((gap <= allowed).all())


QUANTIZE_ROWS = Op(
    name="quantize_rows",
    larger=resized({"N": OUTPUTS, "I": INPUTS}),
    paper="III-D (INT8)",
    axes="N I",
    reference=quantize_rows,
    outputs=("N I", "N"),
    cases=partial(matrix_cases, op="quantize_rows"),
    inputs=quantize_inputs,
    guarantee=Discrete(regret=_regret, scale=_quotient_size),
    properties=(repeats_itself, codes_follow_powers_of_two, loses_at_most_half_a_step),
    variants={"reciprocal": _reciprocal},
    mutants={
        "halves_rounded_away": lambda weight_NI: _quantized(weight_NI, _half_away),
        "truncated": lambda weight_NI: _quantized(weight_NI, torch.trunc),
        "one_scale_for_all_rows": lambda weight_NI: _quantized(weight_NI, torch.round, whole=True),
        "scale_of_128_steps": lambda weight_NI: _quantized(weight_NI, torch.round, steps=128.0),
    },
    flops=lambda n: 3 * n.N * n.I,
    bytes=lambda n: 4 * n.N * n.I + n.N * (n.I + 4),
    fast={Path.COMPILED: fast.QUANTIZE_ROWS},
)


def dequantize_inputs(case: Case) -> Inputs:
    return {"quantized": quantize_rows(weight(case)), "dtype": case.dtype}


def _torch_dequantize(*, quantized: RowQuantized, dtype: torch.dtype) -> Tensor:
    return torch.einsum("n,ni->ni", quantized.scale_N.float(), quantized.quantized_NI.float()).to(dtype)


def _other_rows_scale(inputs: Inputs) -> Inputs:
    quantized: RowQuantized = inputs["quantized"]
    return {"quantized": RowQuantized(quantized.quantized_NI, quantized.scale_N.roll(1))}


def _unsigned(*, quantized: RowQuantized, dtype: torch.dtype) -> Tensor:
    """Codes read as unsigned bytes, as packing into words without sign extension does."""
    return dequantize_rows(RowQuantized(quantized.quantized_NI.int() & 255, quantized.scale_N), dtype)


def _columns_interleaved(inputs: Inputs) -> Inputs:
    """Planar words unpacked as if interleaved: columns come back in another order."""
    quantized: RowQuantized = inputs["quantized"]
    return {"quantized": RowQuantized(torch.flip(quantized.quantized_NI, [1]), quantized.scale_N)}


DEQUANTIZE_ROWS = Op(
    name="dequantize_rows",
    larger=resized({"N": OUTPUTS, "I": INPUTS}),
    paper="III-D (INT8)",
    axes="N I",
    reference=dequantize_rows,
    outputs=("N I",),
    cases=partial(matrix_cases, op="dequantize_rows"),
    inputs=dequantize_inputs,
    guarantee=Budget(rows="N"),
    properties=(repeats_itself,),
    variants={"einsum": _torch_dequantize},
    mutants={
        "another_rows_scale": changed(dequantize_rows, _other_rows_scale),
        "codes_read_unsigned": _unsigned,
        "columns_in_another_order": changed(dequantize_rows, _columns_interleaved),
        "row_3_percent_off": then(dequantize_rows, one_row_3_percent_off),
    },
    flops=lambda n: n.N * n.I,
    bytes=lambda n: n.N * (n.I + 4) + 4 * n.N * n.I,
    fast={Path.COMPILED: fast.DEQUANTIZE_ROWS},
)


def stored_inputs(case: Case) -> Inputs:
    dtype = getattr(torch, str(case.options.get("dtype", "float32")))
    return {"weight_NI": weight(case), "storage": Storage(str(case.options["storage"])), "dtype": dtype}


def numpy_stored(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    """The same rule on numpy: bfloat16 rounded by integer arithmetic on the float's bits."""
    import numpy as np

    weight = weight_NI.float().numpy()
    match storage:
        case Storage.FLOAT32:
            out = weight
        case Storage.BFLOAT16:
            bits = weight.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
            out = rounded.astype(np.uint32).view(np.float32)
        case Storage.INT8:
            scale = np.abs(weight).max(-1) / np.float32(127)
            code = np.rint(weight / np.where(scale > 0, scale, np.float32(1))[:, None]).clip(-127, 127)
            wide = np.float64 if dtype is torch.float64 else np.float32
            out = code.astype(np.int8).astype(wide) * scale[:, None].astype(wide)
        case Storage.INT4:
            out = np.hstack([_numpy_group(weight[:, i : i + 64]) for i in range(0, weight.shape[1], 64)])
    return torch.from_numpy(np.array(out)).to(dtype)


def _numpy_group(weight: Any) -> Any:
    import numpy as np

    low, high = weight.min(-1, keepdims=True), weight.max(-1, keepdims=True)
    step = (high - low) / np.float32(15)
    code = np.rint((weight - low) / np.where(step > 0, step, np.float32(np.inf))).clip(0, 15)
    return code * step + low


def _truncated_bfloat16(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    if storage is not Storage.BFLOAT16:
        return stored(weight_NI, storage, dtype)
    return (weight_NI.float().view(torch.int32) & -65536).view(torch.float32).to(dtype)


def _half_away_int8(*, weight_NI: Tensor, storage: Storage, dtype: torch.dtype) -> Tensor:
    if storage is not Storage.INT8:
        return stored(weight_NI, storage, dtype)
    return dequantize_rows(_quantized(weight_NI, _half_away), dtype)


def _always_float32(inputs: Inputs) -> Inputs:
    return {"storage": Storage.FLOAT32}


STORED = Op(
    name="stored",
    larger=resized({"N": OUTPUTS, "I": INPUTS}),
    paper="III-D",
    axes="N I",
    reference=stored,
    outputs=("N I",),
    cases=partial(matrix_cases, op="stored"),
    inputs=stored_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself,),
    variants={"numpy": numpy_stored},
    mutants={
        "bfloat16_truncated": _truncated_bfloat16,
        "int8_halves_rounded_away": _half_away_int8,
        "storage_ignored": changed(stored, _always_float32),
    },
    flops=lambda n: 4 * n.N * n.I,
    bytes=lambda n: 4 * 2 * n.N * n.I,
    fast={Path.COMPILED: fast.STORED},
)
