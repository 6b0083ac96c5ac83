"""Records of the two ends of a model: embed, head_logits, scale_and_cap.

Shapes: B batch, T tokens, M hidden, W table width, V vocabulary, P positions, Y token types.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.embedding import embed, head_logits, scale_and_cap
from ...spec.config import Activation, AttentionConfig, Head, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormKind
from ...spec.decoder import Path
from ...spec.weights import EmbeddingWeights, LinearWeights, NormWeights
from .. import fast
from ..budget import Budget, Sizes
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations, parameters
from ..op import Op
from ..properties import first_rows_alone, repeats_itself
from ..scale import Known, linear_scale, norm_known, norm_reach
from ..sizes import BATCH, FAR, HIDDEN, TOKENS, VOCABULARY, resized
from ..variants import changed, one_row_3_percent_off, permutation, then
from .linear import adds_up, linear_weights


def embed_cases(pick: Picker) -> Case:
    """On integers without a norm, so that every sum is exact."""
    tokens, positions, hidden = pick.integer(1, 4), pick.integer(4, 9), pick.integer(1, 9)
    data, projected = pick.choice(UNMASKED), pick.choice([False, True])
    norms = [None] if data is Data.INTEGER else [None, *(kind.value for kind in NormKind)]
    return Case(
        op="embed",
        sizes={
            "B": pick.integer(1, 3),
            "T": tokens,
            "M": hidden,
            "W": pick.integer(1, 9) if projected else hidden,
            "V": pick.integer(1, 9),
            "P": positions,
            "Y": pick.choice([1, 3]),
        },
        options={
            "learned": pick.choice([False, True]),
            "start": pick.integer(0, positions - tokens),
            "projected": projected,
            "scale": pick.choice([1.0, 3.0, 45.254834, 0.5]),
            "typed": pick.choice([False, True]),
            "norm": pick.choice(norms),
            "epsilon": pick.choice([1e-5, 1e-2]),
            "jump": pick.choice([False, True]),
        },
        data=data,
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def embed_config(case: Case) -> ModelConfig:
    """A model that embeds as the case says; its one layer is of no account."""
    n, options = case.n, case.options
    rms = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    norm = None
    if options["norm"]:
        norm = NormConfig(kind=NormKind(str(options["norm"])), epsilon=float(options["epsilon"] or 0))
    layer = LayerConfig(
        norm=rms,
        attention=AttentionConfig(heads=1, kv_heads=1, head_size=1, scale=1.0),
        mlp=MlpConfig(width=1, activation=Activation.RELU, gated=False),
    )
    return ModelConfig(
        family="random",
        hidden=n.M,
        vocabulary=n.V,
        context=n.P,
        layers=(layer,),
        final_norm=rms,
        learned_positions=bool(options["learned"]),
        head=Head.TIED,
        embedding_size=n.W if options["projected"] else None,
        embedding_scale=float(options["scale"] or 0),
        embedding_norm=norm,
        token_types=n.Y if options["typed"] else 0,
    )


def embed_inputs(case: Case) -> Inputs:
    n, config, options = case.n, embed_config(case), case.options
    start = int(options["start"] or 0)
    norm = config.embedding_norm
    position_T = torch.arange(start, start + n.T)
    if options["jump"]:  # as where sequences stand one after the other
        position_T = torch.randint(n.P, (n.T,), generator=case.generator("position"))
    token_BT = torch.randint(n.V, (n.B, n.T), generator=case.generator("token"))
    if case.seed % 2:  # the id that overflows first
        token_BT[0, -1] = n.V - 1
    return {
        "token_BT": token_BT,
        "position_T": position_T,
        "type_BT": torch.randint(n.Y, (n.B, n.T), generator=case.generator("type")),
        "weights": EmbeddingWeights(
            token_VW=activations(case, "token table", n.V, n.W),
            position_PM=activations(case, "position table", n.P, n.M) if config.learned_positions else None,
            type_YM=activations(case, "type table", n.Y, n.M) if config.token_types else None,
            norm=None if norm is None else _norm_weights(case, norm),
            projection=linear_weights(case, "projection", n.M, n.W, bias=False) if config.embedding_size else None,
        ),
        "config": config,
        "dtype": case.dtype,
    }


def _norm_weights(case: Case, config: NormConfig) -> NormWeights:
    bias_M = parameters(case, "bias", case.n.M) if config.bias else None
    return NormWeights(gain_M=parameters(case, "gain", case.n.M), bias_M=bias_M)


def _embed_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor | Sizes]:
    weights, config = exact["weights"], exact["config"]
    scale = weights.token_VW[exact["token_BT"]].abs()
    if weights.projection is not None:
        scale = linear_scale(scale, weights.projection)
    scale = abs(config.embedding_scale) * scale
    if weights.position_PM is not None:
        scale = scale + weights.position_PM[exact["position_T"]].abs()
    if weights.type_YM is not None:
        scale = scale + weights.type_YM[exact["type_BT"]].abs()
    if weights.norm is None:
        return [scale]
    before = embed(**{**exact, "weights": replace(weights, norm=None)})
    after = norm_known(Known(before, scale, torch.zeros_like(scale)), weights.norm, config.embedding_norm)
    return [Sizes(after.wide, reach=norm_reach(scale))]


def _torch_embed(
    *,
    token_BT: Tensor,
    position_T: Tensor,
    type_BT: Tensor,
    weights: EmbeddingWeights,
    config: ModelConfig,
    dtype: torch.dtype,
) -> Tensor:
    x_BTM = F.embedding(token_BT, weights.token_VW.float() * config.embedding_scale)
    if weights.projection is not None:
        x_BTM = F.linear(x_BTM, weights.projection.weight_NI.float())
    if weights.type_YM is not None:
        x_BTM = F.embedding(type_BT, weights.type_YM.float()) + x_BTM
    if weights.position_PM is not None:
        x_BTM = F.embedding(position_T, weights.position_PM.float()) + x_BTM
    if weights.norm is None or config.embedding_norm is None:
        return x_BTM.to(dtype)
    gain_M, epsilon = weights.norm.gain_M.float(), config.embedding_norm.epsilon
    if weights.norm.bias_M is None:
        return F.rms_norm(x_BTM, gain_M.shape, gain_M, epsilon).to(dtype)
    return F.layer_norm(x_BTM, gain_M.shape, gain_M, weights.norm.bias_M.float(), epsilon).to(dtype)


def _next_position(inputs: Inputs) -> Inputs:
    position_PM = inputs["weights"].position_PM
    shifted = None if position_PM is None else position_PM.roll(-1, 0)
    return {"weights": replace(inputs["weights"], position_PM=shifted)}


def _no_position(inputs: Inputs) -> Inputs:
    return {"weights": replace(inputs["weights"], position_PM=None)}


def _first_sequence_for_all(inputs: Inputs) -> Inputs:
    return {"token_BT": inputs["token_BT"][:1].expand_as(inputs["token_BT"])}


def _first_type_for_all(inputs: Inputs) -> Inputs:
    return {"type_BT": torch.zeros_like(inputs["type_BT"])}


def _ids_in_16_bits(inputs: Inputs) -> Inputs:
    """Read as negative from 32768 on, which counts from the end of the table."""
    return {"token_BT": inputs["token_BT"].to(torch.int16).long() % len(inputs["weights"].token_VW)}


def _not_scaled(inputs: Inputs) -> Inputs:
    return {"config": replace(inputs["config"], embedding_scale=1.0)}


def _positions_scaled_too(inputs: Inputs) -> Inputs:
    weights, scale = inputs["weights"], inputs["config"].embedding_scale
    position_PM = None if weights.position_PM is None else scale * weights.position_PM
    return {"weights": replace(weights, position_PM=position_PM)}


def _norm_forgotten(inputs: Inputs) -> Inputs:
    return {"weights": replace(inputs["weights"], norm=None)}


def _positions_after_the_norm(**inputs: Any) -> Tensor:
    weights: EmbeddingWeights = inputs["weights"]
    out = embed(**{**inputs, "weights": replace(weights, position_PM=None)})
    if weights.position_PM is None:
        return out
    return (out.float() + weights.position_PM[inputs["position_T"]].float()).to(out.dtype)


def _larger_embed(case: Case, pick: Picker) -> Case:
    """The table is as wide as the model where nothing projects, and positions are enough for the tokens."""

    def fit(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
        start = int(case.options["start"] or 0)
        width = after["W"] if case.options["projected"] else after["M"]
        return {**after, "W": width, "P": max(after["P"], start + after["T"])}

    pools, far = {"M": HIDDEN, "V": VOCABULARY, "T": TOKENS, "B": BATCH}, {"V": FAR["V"], "T": FAR["T"]}
    return resized(pools, fit=fit, far=far)(case, pick)


EMBED = Op(
    name="embed",
    larger=_larger_embed,
    paper="-",
    axes="B T M W V P Y",
    reference=embed,
    outputs=("B T M",),
    cases=embed_cases,
    inputs=embed_inputs,
    guarantee=Budget(rows="B T", scale=_embed_scale, exact_on_integers=True),
    properties=(repeats_itself, first_rows_alone("token_BT")),
    variants={"torch": _torch_embed},
    mutants={
        "position_off_by_one": changed(embed, _next_position),
        "positions_dropped": changed(embed, _no_position),
        "positions_scaled_too": changed(embed, _positions_scaled_too),
        "positions_after_the_norm": _positions_after_the_norm,
        "first_sequence_for_all": changed(embed, _first_sequence_for_all),
        "first_type_for_all": changed(embed, _first_type_for_all),
        "ids_in_16_bits": changed(embed, _ids_in_16_bits),
        "not_scaled": changed(embed, _not_scaled),
        "norm_forgotten": changed(embed, _norm_forgotten),
        "row_3_percent_off": then(embed, one_row_3_percent_off),
    },
    flops=lambda n: n.B * n.T * n.M * (2 * n.W + 10),
    bytes=lambda n: 4 * (n.B * n.T * (4 * n.M + n.W) + n.M * n.W),
    fast={Path.COMPILED: fast.EMBED},
)


def head_cases(pick: Picker) -> Case:
    return Case(
        op="head_logits",
        sizes={"B": pick.integer(1, 3), "T": pick.integer(1, 4), "M": pick.integer(1, 40), "V": pick.integer(1, 30)},
        options={"bias": pick.choice([False, True]), "weights": pick.choice(["float", "int8"])},
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def head_inputs(case: Case) -> Inputs:
    n = case.n
    return {
        "x": activations(case, "x", n.B, n.T, n.M),
        "projection": linear_weights(case, "head", n.V, n.M, bool(case.options["bias"])),
    }


def _head_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [linear_scale(exact["x"].abs(), exact["projection"])]


def _hidden_shuffled(inputs: Inputs) -> Inputs:
    order = permutation(inputs["x"].shape[-1])
    weight_NI = inputs["projection"].weight_NI
    return {"x": inputs["x"][..., order], "projection": replace(inputs["projection"], weight_NI=weight_NI[:, order])}


def _torch_head(*, x: Tensor, projection: LinearWeights) -> Tensor:
    bias_N = None if projection.bias_N is None else projection.bias_N.float()
    return F.linear(x.float(), projection.weight_NI.float(), bias_N)


def _neighbors_row(inputs: Inputs) -> Inputs:
    return {"projection": replace(inputs["projection"], weight_NI=inputs["projection"].weight_NI.roll(1, 0))}


def _no_bias(inputs: Inputs) -> Inputs:
    return {"projection": replace(inputs["projection"], bias_N=None)}


def _last_token_never(out: Tensor) -> Tensor:
    out = out.clone()
    out[..., -1] = 0
    return out


HEAD_LOGITS = Op(
    name="head_logits",
    larger=resized({"M": HIDDEN, "V": VOCABULARY, "T": TOKENS, "B": BATCH}),
    paper="III-A",
    axes="B T M V",
    reference=head_logits,
    outputs=("B T V",),
    cases=head_cases,
    inputs=head_inputs,
    guarantee=Budget(rows="B T", scale=_head_scale, exact_on_integers=True),
    properties=(repeats_itself, first_rows_alone("x"), adds_up),
    variants={"torch": _torch_head, "hidden_shuffled": changed(head_logits, _hidden_shuffled)},
    mutants={
        "bias_dropped": changed(head_logits, _no_bias),
        "rows_shifted_by_one": changed(head_logits, _neighbors_row),
        "last_token_never_scored": then(head_logits, _last_token_never),
        "rounded_to_bfloat16": then(head_logits, lambda out: out.to(torch.bfloat16).to(out.dtype)),
        "row_3_percent_off": then(head_logits, one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.B * n.T * n.M * n.V,
    bytes=lambda n: 4 * (n.B * n.T * (n.M + n.V) + n.V * (n.M + 1)),
    fast={Path.COMPILED: fast.HEAD_LOGITS},
)


def cap_cases(pick: Picker) -> Case:
    return Case(
        op="scale_and_cap",
        sizes={"B": pick.integer(1, 3), "V": pick.integer(1, 30)},
        options={"scale": pick.choice([1.0, 0.0625, 3.0]), "softcap": pick.choice([None, 1.0, 30.0])},
        data=pick.choice(UNMASKED),
        seed=pick.integer(0, 2**31),
    )


def cap_inputs(case: Case) -> Inputs:
    return {"logits": activations(case, "logits", case.n.B, case.n.V, large=6), **case.options}


def _cap_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    """A cap bends without steepening, so no error grows in it; but what it divides may lose digits below normal."""
    scale = exact["scale"] * exact["logits"].abs()
    smallest = (exact["softcap"] or 0) * torch.finfo(torch.float32).smallest_normal
    return [scale.clamp_min(smallest)]


def _divided_first(*, logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return logits * scale if softcap is None else torch.tanh(logits / softcap * scale) * softcap


def _cut_off(*, logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return scale * logits if softcap is None else (scale * logits).clamp(-softcap, softcap)


def _scaled_after_the_cap(*, logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    return scale * scale_and_cap(logits, 1.0, softcap)


SCALE_AND_CAP = Op(
    name="scale_and_cap",
    larger=resized({"V": VOCABULARY, "B": BATCH}),
    paper="-",
    axes="B V",
    reference=scale_and_cap,
    outputs=("B V",),
    cases=cap_cases,
    inputs=cap_inputs,
    guarantee=Budget(rows="B", scale=_cap_scale),
    properties=(repeats_itself, first_rows_alone("logits")),
    variants={"divided_first": _divided_first},
    mutants={
        "not_scaled": changed(scale_and_cap, lambda _: {"scale": 1.0}),
        "divided_by_the_scale": changed(scale_and_cap, lambda inputs: {"scale": 1 / inputs["scale"]}),
        "cut_off": _cut_off,
        "not_capped": changed(scale_and_cap, lambda _: {"softcap": None}),
        "scaled_after_the_cap": _scaled_after_the_cap,
    },
    flops=lambda n: 4 * n.B * n.V,
    bytes=lambda n: 4 * 2 * n.B * n.V,
    fast={Path.COMPILED: fast.SCALE_AND_CAP},
)
