"""Records of what makes one vector out of a text's hidden vectors.

Shapes: T tokens, M hidden, N texts.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.pooling import pool, unit_length
from ...spec.config import Pooling
from ..budget import Budget
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..op import Function, Op
from ..properties import assert_same_bits, call, first_rows_alone, repeats_itself
from ..sizes import HIDDEN, INPUTS, OUTPUTS, TOKENS, resized
from ..variants import changed, one_row_3_percent_off, permutation, then

ONCE_A_TEXT = "runs once a text, on hidden vectors that are done, the same for every path: there is no fast twin"


def pool_cases(pick: Picker) -> Case:
    return Case(
        op="pool",
        sizes={"T": pick.integer(1, 12), "M": pick.integer(1, 20)},
        options={"pooling": pick.choice([pooling.value for pooling in Pooling])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def pool_inputs(case: Case) -> Inputs:
    hidden_TM = activations(case, "hidden", case.n.T, case.n.M)
    return {"hidden_TM": hidden_TM, "pooling": Pooling(str(case.options["pooling"]))}


def _pool_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    """The same sum on absolute values."""
    return [pool(exact["hidden_TM"].abs(), exact["pooling"])]


def _as_product(*, hidden_TM: Tensor, pooling: Pooling) -> Tensor:
    """A row that marks tokens times the hidden vectors, by how many it marks."""
    mark_T = torch.ones(len(hidden_TM))
    if pooling is Pooling.CLS:
        mark_T[1:] = 0
    return (mark_T @ hidden_TM.float() / mark_T.sum()).to(hidden_TM.dtype)


def _tokens_shuffled(*, hidden_TM: Tensor, pooling: Pooling) -> Tensor:
    rest_TM = hidden_TM[1:][permutation(len(hidden_TM) - 1)]
    return pool(torch.cat([hidden_TM[:1], rest_TM]), pooling)


def _other_pooling(inputs: Inputs) -> Inputs:
    return {"pooling": next(pooling for pooling in Pooling if pooling is not inputs["pooling"])}


def _padding_counted(inputs: Inputs) -> Inputs:
    hidden_TM = inputs["hidden_TM"]
    return {"hidden_TM": F.pad(hidden_TM, (0, 0, 0, -len(hidden_TM) % 8))}


def _special_tokens_left_out(inputs: Inputs) -> Inputs:
    hidden_TM = inputs["hidden_TM"]
    return {"hidden_TM": hidden_TM[1:-1] if len(hidden_TM) > 2 else hidden_TM}


def _last_for_first(inputs: Inputs) -> Inputs:
    return {"hidden_TM": inputs["hidden_TM"].flip(0)}


def _largest_for_mean(*, hidden_TM: Tensor, pooling: Pooling) -> Tensor:
    return hidden_TM.amax(0) if pooling is Pooling.MEAN else hidden_TM[0]


def _root_of_tokens(*, hidden_TM: Tensor, pooling: Pooling) -> Tensor:
    return pool(hidden_TM, pooling) * (math.sqrt(len(hidden_TM)) if pooling is Pooling.MEAN else 1)


def _exact(case: Case) -> Case:
    """The case with four tokens of small integers: neither a sum nor a quarter of one rounds."""
    return replace(case, data=Data.INTEGER, sizes={**case.sizes, "T": 4})


def elements_never_mix(op: Op, function: Function, case: Case) -> None:
    """Hidden elements in another order give the same result in that order, bit by bit."""
    case = _exact(case)
    order_M = permutation(case.n.M)
    shuffled = call(op, function, case, hidden_TM=op.inputs(case)["hidden_TM"][:, order_M])
    assert_same_bits([out[order_M] for out in call(op, function, case)], shuffled, "elements never mix")


def equal_tokens_pool_to_themselves(op: Op, function: Function, case: Case) -> None:
    """A text of one vector again and again has that vector, to the bit."""
    case = _exact(case)
    hidden_TM = op.inputs(case)["hidden_TM"]
    hidden_TM = hidden_TM[:1].expand_as(hidden_TM).contiguous()
    pooled = call(op, function, case, hidden_TM=hidden_TM)
    assert [out.tolist() for out in pooled] == [hidden_TM[0].tolist()], "equal tokens pool to themselves"


POOL = Op(
    name="pool",
    larger=resized({"T": TOKENS, "M": HIDDEN}),
    paper="-",
    axes="T M",
    reference=pool,
    outputs=("M",),
    cases=pool_cases,
    inputs=pool_inputs,
    guarantee=Budget(rows="M", scale=_pool_scale),
    properties=(repeats_itself, elements_never_mix, equal_tokens_pool_to_themselves),
    variants={"product": _as_product, "tokens_shuffled": _tokens_shuffled},
    mutants={
        "other_pooling": changed(pool, _other_pooling),
        "padding_counted": changed(pool, _padding_counted),
        "special_tokens_left_out": changed(pool, _special_tokens_left_out),
        "last_token_for_first": changed(pool, _last_for_first),
        "largest_for_mean": _largest_for_mean,
        "times_root_of_tokens": _root_of_tokens,
    },
    flops=lambda n: (n.T + 1) * n.M,
    bytes=lambda n: 4 * (n.T + 1) * n.M,
    no_fast=ONCE_A_TEXT,
)


def unit_cases(pick: Picker) -> Case:
    return Case(
        op="unit_length",
        sizes={"N": pick.integer(1, 4), "M": pick.integer(1, 40)},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def unit_inputs(case: Case) -> Inputs:
    return {"x": activations(case, "x", case.n.N, case.n.M)}


def _unit_scale(exact: Inputs, truth: list[Tensor]) -> list[Tensor]:
    """An element is as wrong as itself and as the length that divides it."""
    return [2 * truth[0].abs()]


def _by_torch(*, x: Tensor) -> Tensor:
    """In float64, whose range the squares of narrower floats do not leave."""
    unit: Tensor = F.normalize(x.double(), dim=-1, eps=torch.finfo(torch.float64).tiny)
    return unit.to(x.dtype)


def _shuffled(*, x: Tensor) -> Tensor:
    order_M = permutation(x.shape[-1])
    return unit_length(x[..., order_M])[..., order_M.argsort()]


def _absolute_sum(*, x: Tensor) -> Tensor:
    wide = x.double()
    return (wide / wide.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).to(x.dtype)


def _mean_square(*, x: Tensor) -> Tensor:
    """As an RMS norm has it: length sqrt(M) instead of 1."""
    return unit_length(x) * math.sqrt(x.shape[-1])


def _over_all_texts(*, x: Tensor) -> Tensor:
    return unit_length(x.flatten()).view_as(x)


def _zeros_divided(*, x: Tensor) -> Tensor:
    wide = x.double()
    return (wide / torch.sqrt((wide * wide).sum(-1, keepdim=True))).to(x.dtype)


def ignores_powers_of_two(op: Op, function: Function, case: Case) -> None:
    """Doubling a vector changes no bit: nothing but its direction is left."""
    case = replace(case, data=Data.NORMAL, dtype=torch.float32)
    doubled = call(op, function, case, x=2 * op.inputs(case)["x"])
    assert_same_bits(call(op, function, case), doubled, "scale invariance")


UNIT_LENGTH = Op(
    name="unit_length",
    larger=resized({"N": OUTPUTS, "M": INPUTS}),
    paper="-",
    axes="N M",
    reference=unit_length,
    outputs=("N M",),
    cases=unit_cases,
    inputs=unit_inputs,
    guarantee=Budget(rows="N", scale=_unit_scale),
    properties=(repeats_itself, first_rows_alone("x"), ignores_powers_of_two),
    variants={"torch": _by_torch, "shuffled": _shuffled},
    mutants={
        "absolute_sum": _absolute_sum,
        "mean_square": _mean_square,
        "over_all_texts": _over_all_texts,
        "zeros_divided": _zeros_divided,
        "row_3_percent_off": then(unit_length, one_row_3_percent_off),
    },
    flops=lambda n: 5 * n.N * n.M,
    bytes=lambda n: 4 * 2 * n.N * n.M,
    no_fast=ONCE_A_TEXT,
)
