"""The record of attention whose scores are capped (softcap) or biased (ALiBi) before the softmax.

Apart from plain attention, so that an implementation that knows neither can be held against that.

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.attention import attention
from ...reference.positions import alibi
from ...spec.decoder import Path
from .. import fast
from ..case import Case, Data, Inputs, Option, Picker, activations
from ..properties import first_rows_alone, repeats_itself
from ..variants import changed
from .attention import (
    ATTENTION,
    attention_cases,
    attention_inputs,
    running_softmax,
)
from .attention_laws import ignores_unseen_keys, stays_between_values


def shaped_cases(pick: Picker) -> Case:
    case = attention_cases(pick)
    shape: dict[str, Option] = {"softcap": pick.choice([None, 0.5, 5.0]), "bias": pick.choice(["slopes", "any", None])}
    shape["sinks"] = pick.choice([False, False, True])
    options = {**case.options, "causal": True, **shape}
    data = Data.NORMAL if case.data is Data.MASKED else case.data
    return replace(case, op="shaped_attention", options=options, data=data)


def shaped_inputs(case: Case) -> Inputs:
    """The bias is any, or ALiBi's with slopes 1, 1/2, 1/4 and so on, exact in every dtype."""
    n = case.n
    plain = attention_inputs(case)
    slope_H = 2.0 ** -torch.arange(n.H)
    bias_HTS = alibi(slope_H, torch.arange(n.S - n.T, n.S), torch.arange(n.S)).to(case.dtype)
    if case.options["bias"] == "any":
        bias_HTS = activations(case, "bias", n.H, n.T, n.S, large=2)
    return {
        **plain,
        "bias_HTS": bias_HTS if case.options["bias"] else None,
        "softcap": case.options["softcap"],
        "sink_H": _sinks(case) if case.options.get("sinks") else None,
    }


def _sinks(case: Case) -> Tensor:
    """A score of each head, of the size of its other scores."""
    return activations(replace(case, data=Data.NORMAL), "sink", case.n.H)


def _torch_shaped(*, bias_HTS: Tensor | None, softcap: float | None, sink_H: Tensor | None, **inputs: Any) -> Tensor:
    """torch's softmax over scores made by torch's product; its fused attention where nothing is capped."""
    visible_TS, scale = inputs["visible_TS"], inputs["scale"]
    query, key, value = (inputs[name].float().transpose(1, 2) for name in ("query_BTHD", "key_BSKD", "value_BSKD"))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    seen_B1TS = visible_TS.expand(len(query), -1, -1)[:, None]
    added = torch.zeros(seen_B1TS.shape).masked_fill(~seen_B1TS, -torch.inf)
    added = added if bias_HTS is None else added + bias_HTS.float()
    if softcap is None and sink_H is None:
        added = added.expand(-1, query.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
    else:
        score = query @ key.mT * scale
        score = (score if softcap is None else softcap * torch.tanh(score / softcap)) + added
        if sink_H is not None:
            score = torch.cat([score, sink_H.float()[:, None, None].expand(*score.shape[:-1], 1)], -1)
        out = torch.softmax(score, -1)[..., : key.shape[2]] @ value
    return out.transpose(1, 2).to(inputs["query_BTHD"].dtype)


def _capped_after_the_mask(*, softcap: float | None, visible_TS: Tensor, scale: float, **inputs: Any) -> Tensor:
    """What may not be seen scores -softcap instead of -inf."""
    if softcap is None:
        return attention(**inputs, visible_TS=visible_TS, scale=scale)
    if visible_TS.ndim == 3:  # a bias is the same for every sequence
        visible_TS = visible_TS[0]
    hidden_HTS = torch.where(visible_TS, 0.0, -softcap).expand(inputs["query_BTHD"].shape[2], -1, -1)
    everything_TS = torch.ones_like(visible_TS)
    bias_HTS = hidden_HTS if inputs["bias_HTS"] is None else inputs["bias_HTS"].to(hidden_HTS.dtype) + hidden_HTS
    given = {**inputs, "bias_HTS": bias_HTS}
    return attention(**given, visible_TS=everything_TS, scale=scale, softcap=softcap)


def _not_capped(inputs: Inputs) -> Inputs:
    return {"softcap": None}


def _capped_before_scaling(inputs: Inputs) -> Inputs:
    """cap(q k) * scale in place of cap(scale * q k)."""
    softcap = inputs["softcap"]
    return {"softcap": None if softcap is None else softcap * inputs["scale"]}


def _sink_forgotten(inputs: Inputs) -> Inputs:
    return {"sink_H": None}


def _sinks_of_the_neighboring_head(inputs: Inputs) -> Inputs:
    sink_H = inputs["sink_H"]
    return {"sink_H": None if sink_H is None else sink_H.roll(1)}


def _with_bias(change: Callable[[Tensor, Inputs], Tensor]) -> Callable[[Inputs], Inputs]:
    def changed_inputs(inputs: Inputs) -> Inputs:
        bias_HTS = inputs["bias_HTS"]
        return {} if bias_HTS is None else {"bias_HTS": change(bias_HTS, inputs)}

    return changed_inputs


SHAPED_ATTENTION = replace(
    ATTENTION,
    name="shaped_attention",
    cases=shaped_cases,
    inputs=shaped_inputs,
    variants={"torch": _torch_shaped, "running_softmax": running_softmax},
    mutants={
        "softcap_after_the_mask": _capped_after_the_mask,
        "softcap_forgotten": changed(attention, _not_capped),
        "softcap_before_scaling": changed(attention, _capped_before_scaling),
        "sink_forgotten": changed(attention, _sink_forgotten),
        "sinks_of_the_neighboring_head": changed(attention, _sinks_of_the_neighboring_head),
        "bias_sign_flipped": changed(attention, _with_bias(lambda bias, _: -bias)),
        "bias_scaled": changed(attention, _with_bias(lambda bias, inputs: inputs["scale"] * bias)),
        "biases_of_the_neighboring_head": changed(attention, _with_bias(lambda bias, _: bias.roll(1, 0))),
        **{name: ATTENTION.mutants[name] for name in ("mask_ignored", "heads_grouped_by_modulo", "row_3_percent_off")},
    },
    properties=(
        repeats_itself,
        first_rows_alone("query_BTHD", "key_BSKD", "value_BSKD"),
        ignores_unseen_keys,
        stays_between_values,
    ),
    fast={Path.COMPILED: fast.SHAPED_ATTENTION},
    conventions={},
)
