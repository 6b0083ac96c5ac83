"""Records of the paper's small-batch product: interleave, deinterleave, sbi_gemm.

Shapes: B rows of x, K inputs, N outputs, M interleaved rows, L = ceil(K / M) lines, X = N * M.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...reference.sbi_gemm import LANES, deinterleave, interleave, sbi_gemm, tiling
from ...spec.decoder import Path
from .. import fast
from ..budget import Budget
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations, parameters
from ..guarantees import Bitwise
from ..op import Function, Op
from ..properties import assert_same_bits, call, repeats_itself
from ..sizes import HIDDEN, INPUTS, OUTPUTS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then

NO_LINES = "a layout for 32 lanes of a GPU; the compiled path packs words for vector registers (compiled.packing)"


def layout_cases(pick: Picker, op: str) -> Case:
    return Case(
        op=op,
        sizes={"K": pick.integer(1, 20), "N": pick.integer(1, 9), "M": pick.choice([2, 4, 1])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def interleave_inputs(case: Case) -> Inputs:
    n = case.n
    return {"weight_KN": activations(case, "weight", n.K, n.N), "rows": n.M}


def deinterleave_inputs(case: Case) -> Inputs:
    n = case.n
    return {"line_LX": interleave(activations(case, "weight", n.K, n.N), n.M), "rows": n.M, "inputs": n.K}


def _by_index(*, weight_KN: Tensor, rows: int) -> Tensor:
    """The index formula, element by element."""
    inputs, outputs = weight_KN.shape
    line_LX = torch.zeros(-(-inputs // rows), outputs * rows, dtype=weight_KN.dtype)
    for k in range(inputs):
        for n in range(outputs):
            line_LX[k // rows, n * rows + k % rows] = weight_KN[k, n]
    return line_LX


def _columns_interleaved(*, weight_KN: Tensor, rows: int) -> Tensor:
    """Row after row instead of column by column: M rows side by side, as a plain reshape gives."""
    whole_KN = torch.nn.functional.pad(weight_KN, (0, 0, 0, -weight_KN.shape[0] % rows))
    return whole_KN.reshape(-1, rows * weight_KN.shape[1])


def _distant_rows(*, weight_KN: Tensor, rows: int) -> Tensor:
    """Rows k, k + L, k + 2 L of a line in place of consecutive ones."""
    lines = -(-weight_KN.shape[0] // rows)
    whole_KN = torch.nn.functional.pad(weight_KN, (0, 0, 0, lines * rows - weight_KN.shape[0]))
    return whole_KN.reshape(rows, lines, -1).permute(1, 2, 0).reshape(lines, -1)


def _last_row_repeated(*, weight_KN: Tensor, rows: int) -> Tensor:
    """The padding of the last line holds weights, which would count twice."""
    lacking = -weight_KN.shape[0] % rows
    return interleave(torch.cat([weight_KN, weight_KN[-1:].expand(lacking, -1)]), rows)


def comes_back(op: Op, function: Function, case: Case) -> None:
    """Whatever was interleaved is given back by the reference's inverse, bit by bit."""
    inputs = op.inputs(case)
    back = deinterleave(function(**inputs), inputs["rows"], len(inputs["weight_KN"]))
    assert_same_bits([back], [inputs["weight_KN"]], "interleaving is a permutation")


INTERLEAVE = Op(
    name="interleave",
    larger=resized({"K": HIDDEN, "N": OUTPUTS}),
    paper="III-C, Fig. 1b",
    axes="K N M",
    reference=interleave,
    outputs=("L X",),
    cases=partial(layout_cases, op="interleave"),
    inputs=interleave_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself, comes_back),
    variants={"by_index": _by_index},
    mutants={
        "rows_side_by_side": _columns_interleaved,
        "distant_rows": _distant_rows,
        "last_row_repeated": _last_row_repeated,
    },
    flops=lambda n: 0,
    bytes=lambda n: 4 * n.N * (n.K + -(-n.K // n.M) * n.M),
    no_fast=NO_LINES,
)


def _line_by_line(*, line_LX: Tensor, rows: int, inputs: int) -> Tensor:
    return torch.cat([line_X.reshape(-1, rows).t() for line_X in line_LX])[:inputs].contiguous()


def _padding_kept_in_front(*, line_LX: Tensor, rows: int, inputs: int) -> Tensor:
    return deinterleave(line_LX, rows, len(line_LX) * rows)[-inputs:]


DEINTERLEAVE = Op(
    name="deinterleave",
    larger=resized({"K": HIDDEN, "N": OUTPUTS}),
    paper="III-C, Fig. 1b",
    axes="K N M",
    reference=deinterleave,
    outputs=("K N",),
    cases=partial(layout_cases, op="deinterleave"),
    inputs=deinterleave_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself,),
    variants={"line_by_line": _line_by_line},
    mutants={
        "rows_side_by_side": lambda line_LX, rows, inputs: line_LX.reshape(-1, line_LX.shape[1] // rows)[:inputs],
        "pairs_swapped": lambda line_LX, rows, inputs: deinterleave(line_LX.flip(1), rows, inputs).flip(1),
        "padding_kept_in_front": _padding_kept_in_front,
    },
    flops=lambda n: 0,
    bytes=lambda n: 4 * n.N * (n.K + -(-n.K // n.M) * n.M),
    no_fast=NO_LINES,
)


def product_cases(pick: Picker) -> Case:
    """Up to three tiles with a tail, up to a few sections; weights of the case's dtype, or int8 codes."""
    return Case(
        op="sbi_gemm",
        sizes={"B": pick.integer(1, 4), "K": pick.integer(1, 70), "N": pick.integer(1, 3 * LANES)},
        options={"blocks": pick.choice([1, 2, 5, 16]), "codes": pick.choice([False, True])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def product_inputs(case: Case) -> Inputs:
    n = case.n
    weight_NK = parameters(case, "weight", n.N, n.K)
    if case.options["codes"]:
        weight_NK = (weight_NK.double() * (1 if case.data is Data.INTEGER else 30)).round().clamp(-127, 127)
        weight_NK = weight_NK.to(torch.int8)
    return {
        "x_BK": activations(case, "x", n.B, n.K),
        "weight_KN": weight_NK.t().contiguous(),
        "blocks": int(case.options["blocks"] or 1),
    }


def _absolute_product(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    """The same contraction on absolute values."""
    return [exact["x_BK"].abs() @ exact["weight_KN"].double().abs()]


def _matmul(*, x_BK: Tensor, weight_KN: Tensor, blocks: int) -> Tensor:
    return (x_BK.float() @ weight_KN.float()).to(x_BK.dtype)


def _inputs_shuffled(inputs: Inputs) -> Inputs:
    order = permutation(inputs["x_BK"].shape[1])
    return {"x_BK": inputs["x_BK"][:, order], "weight_KN": inputs["weight_KN"][order]}


def _tile_and_last_section(weight_KN: Tensor, blocks: int) -> tuple[int, int]:
    """The outputs of a tile, and the first input of the last section."""
    rows = max(1, 4 // weight_KN.element_size())
    lines = -(-len(weight_KN) // rows)
    divided = tiling(weight_KN.shape[1], lines, blocks)
    return divided.tile, int(torch.arange(lines).tensor_split(divided.sections)[-1][0]) * rows


def _last_section_dropped(inputs: Inputs) -> Inputs:
    """By the second pass, where there is one."""
    weight_KN = inputs["weight_KN"].clone()
    _, first = _tile_and_last_section(weight_KN, inputs["blocks"])
    weight_KN[first if first else len(weight_KN) :] = 0
    return {"weight_KN": weight_KN}


def _tail_of_tile_dropped(inputs: Inputs) -> Inputs:
    """As where the number of tiles is rounded down."""
    weight_KN = inputs["weight_KN"].clone()
    tile, _ = _tile_and_last_section(weight_KN, inputs["blocks"])
    weight_KN[:, weight_KN.shape[1] // tile * tile :] = 0
    return {"weight_KN": weight_KN}


def _tiles_overlap(*, x_BK: Tensor, weight_KN: Tensor, blocks: int) -> Tensor:
    """The first output of each tile but the first is added to by its neighbor as well."""
    out_BN = sbi_gemm(x_BK, weight_KN, blocks=blocks)
    tile, _ = _tile_and_last_section(weight_KN, blocks)
    out_BN[:, tile::tile] *= 2
    return out_BN


def _read_as_rows(inputs: Inputs) -> Inputs:
    """Lines laid out column by column, read as if M rows stood side by side."""
    weight_KN: Tensor = inputs["weight_KN"]
    rows = max(2, 4 // weight_KN.element_size())
    line_LX = interleave(weight_KN, rows)
    return {"weight_KN": line_LX.reshape(-1, weight_KN.shape[1])[: len(weight_KN)]}


def any_division_is_the_same(op: Op, function: Function, case: Case) -> None:
    """On integers, where every partial sum is exact, the number of blocks changes no bit."""
    whole = replace(case, data=Data.INTEGER, dtype=torch.float32)
    outs = [call(op, function, whole, blocks=blocks) for blocks in (1, 3, 40)]
    assert_same_bits(outs[0], outs[1], "one block and three")
    assert_same_bits(outs[0], outs[2], "one block and forty")


SBI_GEMM = Op(
    name="sbi_gemm",
    larger=resized({"K": INPUTS, "N": (*OUTPUTS, 257), "B": (5, 15, 16, 17, 33)}),
    paper="III-C, Fig. 1a and 1b",
    axes="B K N",
    reference=sbi_gemm,
    outputs=("B N",),
    cases=product_cases,
    inputs=product_inputs,
    guarantee=Budget(rows="B", scale=_absolute_product, exact_on_integers=True),
    properties=(repeats_itself, any_division_is_the_same),
    variants={
        "matmul": _matmul,
        "inputs_shuffled": changed(sbi_gemm, _inputs_shuffled),
        "another_division": changed(sbi_gemm, lambda inputs: {"blocks": inputs["blocks"] + 7}),
    },
    mutants={
        "last_section_dropped": changed(sbi_gemm, _last_section_dropped),
        "tail_of_tile_dropped": changed(sbi_gemm, _tail_of_tile_dropped),
        "tiles_overlap": _tiles_overlap,
        "lines_read_as_rows": changed(sbi_gemm, _read_as_rows),
        "row_3_percent_off": then(sbi_gemm, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.B * n.K * n.N,
    bytes=lambda n: 4 * (n.B * (n.K + n.N) + n.K * n.N),
    fast={Path.COMPILED: fast.SBI_GEMM},
)
