"""Records of attention: visible, attention.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H/K, D head size.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from ...reference.attention import attention, visible
from ...spec.decoder import Path
from .. import fast
from ..budget import Budget, Sizes
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..guarantees import Bitwise
from ..op import Function, Op
from ..properties import assert_same_bits, first_rows_alone, repeats_itself
from ..scale import attention_known, exactly, shared
from ..sizes import BATCH, FAR_KEYS, HEAD_SIZE, TOKENS, keys_cover_queries, resized
from ..variants import changed, one_row_3_percent_off, permutation, then
from .attention_laws import ignores_unseen_keys, permuting_groups_permutes_output, stays_between_values


def visible_cases(pick: Picker) -> Case:
    new = pick.integer(1, 5)
    return Case(
        op="visible",
        sizes={"T": new, "S": new + pick.integer(0, 6)},
        options={
            "causal": pick.choice([True, False]),
            "window": pick.choice([None, 1, 2, 3, 20]),
            "key_length": pick.choice([None, 0, 1, 4]),
            "restart": pick.choice([False, False, True]),
        },
        seed=pick.integer(0, 2**31),
    )


def visible_inputs(case: Case) -> Inputs:
    n = case.n
    position_S = torch.arange(n.S)
    if case.options["restart"]:  # from 0 again half-way, as where sequences stand one after the other
        position_S = position_S % max(1, (n.S + 1) // 2)
    options = {name: value for name, value in case.options.items() if name != "restart"}
    return {"query_position_T": position_S[n.S - n.T :], "key_position_S": position_S, **options}


def _brute_force(
    *,
    query_position_T: Tensor,
    key_position_S: Tensor,
    causal: bool = True,
    window: int | None = None,
    key_length: int | None = None,
) -> Tensor:
    """One pair at a time, in Python integers."""
    return torch.tensor(
        [
            [
                (not causal or s <= t) and (window is None or s > t - window) and (key_length is None or s < key_length)
                for s in key_position_S.tolist()
            ]
            for t in query_position_T.tolist()
        ]
    )


def _wider_window(inputs: Inputs) -> Inputs:
    return {"window": None if inputs["window"] is None else inputs["window"] + 1}


def _strictly_before(inputs: Inputs) -> Inputs:
    return {"query_position_T": inputs["query_position_T"] - 1} if inputs["causal"] else {}


def _top_left(inputs: Inputs) -> Inputs:
    return {"query_position_T": torch.arange(len(inputs["query_position_T"]))}


def _padding_seen(inputs: Inputs) -> Inputs:
    return {"key_length": None}


def moves_with_positions(op: Op, function: Function, case: Case) -> None:
    """Only distances matter: moving every position by the same amount, 100 003 tokens, changes nothing."""
    inputs = {**op.inputs(case), "key_length": None}
    moved = {name: value + 100_003 if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert_same_bits([function(**inputs)], [function(**moved)], "translation")


VISIBLE = Op(
    name="visible",
    larger=resized({"T": TOKENS, "S": TOKENS}, fit=keys_cover_queries),
    paper="III-D",
    axes="T S",
    reference=visible,
    outputs=("T S",),
    cases=visible_cases,
    inputs=visible_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself, moves_with_positions),
    variants={"brute_force": _brute_force},
    mutants={
        "window_off_by_one": changed(visible, _wider_window),
        "self_not_seen": changed(visible, _strictly_before),
        "top_left_alignment": changed(visible, _top_left),
        "padding_seen": changed(visible, _padding_seen),
    },
    flops=lambda n: 0,
    bytes=lambda n: n.T * n.S,
    fast={Path.COMPILED: fast.VISIBLE},
)


def attention_cases(pick: Picker) -> Case:
    new, kv_heads = pick.integer(1, 5), pick.integer(1, 3)
    return Case(
        op="attention",
        sizes={
            "B": pick.integer(1, 2),
            "T": new,
            "S": new + pick.integer(0, 6),
            "H": kv_heads * pick.choice([1, 2, 3, 8]),
            "K": kv_heads,
            "D": pick.integer(1, 8),
        },
        options={
            "causal": pick.choice([True, False]),
            "window": pick.choice([None, 1, 2, 3]),
            "scale": pick.choice([None, None, 1.0, 0.3, 0.02]),
            "per_sequence": pick.choice([False, False, True]),
        },
        data=pick.choice((*UNMASKED, Data.MASKED)),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def _compared(case: Case) -> tuple[Tensor, Tensor]:
    """Queries and keys. HUGE: huge queries and tiny keys, whose scores are ordinary; or scores past 10000."""
    n, smaller, large = case.n, 1.0, 5
    queries = keys = case
    if case.data is Data.HUGE and case.seed % 8:
        smaller, keys = 2.0**-5 if case.dtype is torch.float16 else 2.0**-63, replace(case, data=Data.NORMAL)
    elif case.data is Data.HUGE:
        large, queries = 7, replace(case, data=Data.LARGE)
        keys = queries
    query_BTHD = activations(queries, "query", n.B, n.T, n.H, n.D, large=large)
    return query_BTHD, activations(keys, "key", n.B, n.S, n.K, n.D, large=large) * smaller


def attention_inputs(case: Case) -> Inputs:
    query_BTHD, key_BSKD = _compared(case)
    n = case.n
    return {
        "query_BTHD": query_BTHD,
        "key_BSKD": key_BSKD,
        "value_BSKD": activations(case, "value", n.B, n.S, n.K, n.D),
        "visible_TS": _mask_of_sequences(case) if case.options.get("per_sequence") else _mask(case),
        "scale": n.D**-0.5 if case.options.get("scale") is None else case.options["scale"],
    }


def _mask(case: Case) -> Tensor:
    """MASKED: any mask at all, and about a third of the queries see nothing."""
    n = case.n
    if case.data is Data.MASKED:
        seen_TS = torch.rand(n.T, n.S, generator=case.generator("mask")) < 0.6
        blind_T1 = torch.rand(n.T, 1, generator=case.generator("blind")) < 0.3
        return seen_TS & ~blind_T1
    position_S = torch.arange(n.S)
    options = {name: case.options[name] for name in ("causal", "window")}
    return visible(position_S[n.S - n.T :], position_S, **options)  # type: ignore[arg-type]


def _mask_of_sequences(case: Case) -> Tensor:
    """One mask for each sequence, [B, T, S], which sees keys up to a length of its own."""
    n = case.n
    length_B11 = torch.randint(1, n.S + 1, (n.B, 1, 1), generator=case.generator("lengths"))
    seen_TS = _mask(case)
    shorter_BTS = seen_TS & (torch.arange(n.S) < length_B11)
    return shorter_BTS if case.data is Data.MASKED else shorter_BTS.where(shorter_BTS.any(-1, keepdim=True), seen_TS)


def _attention_scale(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    query, key, value = (exactly(exact[name]) for name in ("query_BTHD", "key_BSKD", "value_BSKD"))
    options = {name: each for name, each in exact.items() if name not in ("query_BTHD", "key_BSKD", "value_BSKD")}
    out = attention_known(query, key, value, **options)
    return [Sizes(out.wide, 2 * shared(out.narrow))]  # the reference stores nothing on the way


def _torch_attention(
    *, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, visible_TS: Tensor, scale: float
) -> Tensor:
    """torch's own kernel, in the inputs' dtype."""
    query, key, value = (x.transpose(1, 2) for x in (query_BTHD, key_BSKD, value_BSKD))
    mask = visible_TS if visible_TS.ndim == 2 else visible_TS[:, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _keys_shuffled(inputs: Inputs) -> Inputs:
    order = permutation(inputs["visible_TS"].shape[-1])
    return {
        "key_BSKD": inputs["key_BSKD"][:, order],
        "value_BSKD": inputs["value_BSKD"][:, order],
        "visible_TS": inputs["visible_TS"][..., order],
    }


def _head_size_shuffled(inputs: Inputs) -> Inputs:
    order = permutation(inputs["query_BTHD"].shape[-1])
    return {"query_BTHD": inputs["query_BTHD"][..., order], "key_BSKD": inputs["key_BSKD"][..., order]}


def running_softmax(
    *,
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visible_TS: Tensor,
    scale: float,
    bias_HTS: Tensor | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """One key after the other, with a running peak and sum (Milakov, Gimelshein 2018), as fused kernels do."""
    group = query_BTHD.shape[2] // key_BSKD.shape[2]
    key, value = (x.float().repeat_interleave(group, 2) for x in (key_BSKD, value_BSKD))
    query = query_BTHD.float() * scale
    peak = torch.full(query.shape[:3], -torch.inf) if sink_H is None else sink_H.float().expand(query.shape[:3])
    total, out = torch.full(query.shape[:3], 0.0 if sink_H is None else 1.0), torch.zeros_like(query)
    for s in range(visible_TS.shape[-1]):
        seen_BT1 = visible_TS.expand(len(query), -1, -1)[:, :, s, None]
        score = (query * key[:, s, None]).sum(-1)
        score = score if softcap is None else torch.tanh(score / softcap) * softcap
        score = score if bias_HTS is None else score + bias_HTS[None, :, :, s].mT.float()
        score = score.masked_fill(~seen_BT1, -torch.inf)
        new_peak = torch.maximum(peak, score)
        shrink = torch.exp(peak - new_peak).nan_to_num(0.0)
        weight = torch.exp(score - new_peak).nan_to_num(0.0)
        total, peak = total * shrink + weight, new_peak
        out = out * shrink[..., None] + weight[..., None] * value[:, s, None]
    return (out / total.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).to(query_BTHD.dtype)


def _not_scaled(inputs: Inputs) -> Inputs:
    return {"scale": 1.0}


def _scaled_by_size(inputs: Inputs) -> Inputs:
    return {"scale": inputs["scale"] ** 2}


def _mask_off_by_one(inputs: Inputs) -> Inputs:
    return {"visible_TS": inputs["visible_TS"].roll(1, dims=-1)}


def _mask_ignored(inputs: Inputs) -> Inputs:
    return {"visible_TS": torch.ones_like(inputs["visible_TS"])}


def _stale_last_row(inputs: Inputs) -> Inputs:
    changed = {}
    for name in ("key_BSKD", "value_BSKD"):
        changed[name] = inputs[name].clone()
        changed[name][:, -1] = inputs[name].roll(1, dims=1)[:, -1]
    return changed


def _grouped_by_modulo(inputs: Inputs) -> Inputs:
    """Query head h reads key/value head h % K instead of h // G."""
    heads = inputs["query_BTHD"].shape[2]
    modulo = torch.arange(heads) % inputs["key_BSKD"].shape[2]
    return {"key_BSKD": inputs["key_BSKD"][:, :, modulo], "value_BSKD": inputs["value_BSKD"][:, :, modulo]}


def _groups_of_four_at_most(**inputs: Any) -> Tensor:
    """Query heads past the fourth of a group read what the first read."""
    out_BTHD = attention(**inputs)
    group = out_BTHD.shape[2] // inputs["key_BSKD"].shape[2]
    out_BTKGD = rearrange(out_BTHD, "b t (k g) d -> b t k g d", g=group).clone()
    out_BTKGD[:, :, :, 4:] = out_BTKGD[:, :, :, :1]
    return rearrange(out_BTKGD, "b t k g d -> b t (k g) d")


def _hidden_by_ten_thousand(
    *, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, visible_TS: Tensor, scale: float
) -> Tensor:
    """What may not be seen is scored 10000 less instead of being ruled out; who sees nothing gets zeros."""
    seen_BTS = visible_TS.expand(len(query_BTHD), -1, -1)
    grouped = rearrange(query_BTHD.float(), "b t (k g) d -> b k g t d", k=key_BSKD.shape[2])
    score = scale * einsum(grouped, key_BSKD.float(), "b k g t d, b s k d -> b k g t s")
    weight = torch.softmax(score - 10_000 * (~seen_BTS[:, None, None]).float(), -1)
    weight = weight * seen_BTS.any(-1, keepdim=True)[:, None, None]
    out = einsum(weight, value_BSKD.float(), "b k g t s, b s k d -> b t k g d")
    return rearrange(out, "b t k g d -> b t (k g) d").to(query_BTHD.dtype)


def _not_normalized(
    *, query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, visible_TS: Tensor, scale: float, **_: object
) -> Tensor:
    wide = query_BTHD.float()
    grouped = rearrange(wide, "b t (k g) d -> b k g t d", k=key_BSKD.shape[2])
    score = scale * einsum(grouped, key_BSKD.float(), "b k g t d, b s k d -> b k g t s")
    seen_BTS = visible_TS.expand(len(query_BTHD), -1, -1)
    score = score.masked_fill(~seen_BTS[:, None, None], -torch.inf)
    weight = torch.exp(score - score.amax(-1, keepdim=True).nan_to_num(neginf=0.0))
    out = einsum(weight, value_BSKD.float(), "b k g t s, b s k d -> b t k g d")
    return rearrange(out, "b t k g d -> b t (k g) d").to(query_BTHD.dtype)


def _blind_queries_average(inputs: Inputs) -> Inputs:
    """A query that may see nothing sees everything, as with a mask of -10000 added to the scores."""
    seen_TS = inputs["visible_TS"]
    return {"visible_TS": seen_TS | ~seen_TS.any(-1, keepdim=True)}


def _unseen_not_a_number(case: Case) -> Inputs:
    """NaN in every key and value that no query may see."""
    inputs = attention_inputs(case)
    seen_BTS = inputs["visible_TS"].expand(case.n.B, -1, -1)
    unseen = ~seen_BTS.any(1)[:, :, None, None]
    return {**inputs, **{name: inputs[name].masked_fill(unseen, torch.nan) for name in ("key_BSKD", "value_BSKD")}}


ATTENTION = Op(
    name="attention",
    larger=resized({"T": TOKENS, "S": TOKENS, "D": HEAD_SIZE, "B": BATCH}, fit=keys_cover_queries, far=FAR_KEYS),
    paper="III-D, Fig. 1c (region 2)",
    axes="B T S H K D",
    reference=attention,
    outputs=("B T H D",),
    cases=attention_cases,
    inputs=attention_inputs,
    guarantee=Budget(rows="B T H", scale=_attention_scale),
    properties=(
        repeats_itself,
        first_rows_alone("query_BTHD", "key_BSKD", "value_BSKD"),
        ignores_unseen_keys,
        permuting_groups_permutes_output,
        stays_between_values,
    ),
    variants={
        "torch": _torch_attention,
        "keys_shuffled": changed(attention, _keys_shuffled),
        "head_size_shuffled": changed(attention, _head_size_shuffled),
        "running_softmax": running_softmax,
    },
    mutants={
        "not_scaled": changed(attention, _not_scaled),
        "scaled_by_head_size": changed(attention, _scaled_by_size),
        "mask_off_by_one": changed(attention, _mask_off_by_one),
        "mask_ignored": changed(attention, _mask_ignored),
        "stale_cache_row": changed(attention, _stale_last_row),
        "heads_grouped_by_modulo": changed(attention, _grouped_by_modulo),
        "softmax_not_normalized": _not_normalized,
        "groups_of_four_at_most": _groups_of_four_at_most,
        "hidden_by_ten_thousand": _hidden_by_ten_thousand,
        "blind_queries_average": changed(attention, _blind_queries_average),
        "row_3_percent_off": then(attention, one_row_3_percent_off),
    },
    flops=lambda n: 4 * n.B * n.H * n.T * n.S * n.D,
    bytes=lambda n: 4 * (2 * n.B * n.T * n.H * n.D + 2 * n.B * n.S * n.K * n.D) + n.T * n.S,
    fast={Path.COMPILED: fast.ATTENTION},
    conventions={"unseen=nan": {"inputs": _unseen_not_a_number}},
)
