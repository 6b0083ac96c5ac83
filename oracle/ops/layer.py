"""Records of the composed parts: self_attention, layer.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size, F
intermediate, J rotating pairs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...reference.cache import KVCache
from ...reference.components import DEFAULT, Components
from ...reference.layer import layer, self_attention
from ...reference.linear import linear
from ...reference.norms import norm
from ...reference.positions import rotate
from ...reference.routing import Routing, choice_weights, route
from ...spec.config import (
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    NormConfig,
    NormPlacement,
    QkNormSpan,
    Residual,
    RotaryLayout,
)
from ...spec.moe import MoeConfig, RouterConfig
from ...spec.weights import AttentionWeights, LayerWeights, LinearWeights, NormWeights
from ..budget import Budget
from ..case import Case, Inputs
from ..op import Function, Op
from ..properties import assert_same_bits, call, repeats_itself
from ..sizes import BATCH, resized
from ..variants import changed, one_row_3_percent_off, permutation, then
from .attention import ATTENTION
from .layer_cases import layer_cases, layer_inputs, self_attention_inputs
from .layer_routing import DecidedBudget
from .layer_scale import scale_of_layer, scale_of_self_attention
from .mlp import MLP
from .moe_faults import FAULTS
from .positions import ROTATE


def _with(**components: Any) -> Components:
    return replace(DEFAULT, **components)


def _as_component(function: Function) -> Function:
    """An op's variant, which takes keywords, as a component, which takes positions."""

    def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        return function(query_BTHD=query, key_BSKD=key, value_BSKD=value, **options)

    return call


def _rotate_component(function: Function) -> Function:
    def call(
        x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
    ) -> Any:
        return function(
            x_BTHD=x_BTHD,
            position_T=position_T,
            frequency_J=frequency_J,
            layout=layout,
            attention_factor=attention_factor,
        )

    return call


def _mlp_component(function: Function) -> Function:
    def call(x_BTM: Tensor, weights: Any, config: MlpConfig, *, linear: Any) -> Any:
        return function(x_BTM=x_BTM, weights=weights, config=config)

    return call


def _linear_shuffled(x: Tensor, weights: LinearWeights) -> Tensor:
    order = permutation(x.shape[-1])
    return linear(x[..., order], LinearWeights(weight_NI=weights.weight_NI[:, order], bias_N=weights.bias_N))


_EXPERT_FAULTS = (
    "router_renormalization_forgotten",
    "router_choice_bias_in_the_weights",
    "experts_off_by_one",
    "shared_forgotten",
    "shared_gate_forgotten",
    "mix_swapped",
)
_SUMMED_OTHERWISE = _with(
    attention=_as_component(ATTENTION.variants["running_softmax"]),
    rotate=_rotate_component(ROTATE.variants["partner"]),
    mlp=_mlp_component(MLP.variants["wide"]),
    linear=_linear_shuffled,
)
_FLOAT32_ANGLES = _with(rotate=_rotate_component(ROTATE.under("angles=float32").reference))
_WRONG_COMPONENTS = {
    "not_scaled": _with(attention=_as_component(ATTENTION.mutants["not_scaled"])),
    "mask_off_by_one": _with(attention=_as_component(ATTENTION.mutants["mask_off_by_one"])),
    "heads_grouped_by_modulo": _with(attention=_as_component(ATTENTION.mutants["heads_grouped_by_modulo"])),
    "softmax_not_normalized": _with(attention=_as_component(ATTENTION.mutants["softmax_not_normalized"])),
    "halves_swapped": _with(rotate=_rotate_component(ROTATE.mutants["halves_swapped"])),
    "position_off_by_one_from_the_second_token": _with(
        rotate=_rotate_component(ROTATE.mutants["one_position_for_all"])
    ),
}


def _stale_row(function: Function) -> Function:
    """The last remembered token is the one before it: a cache row that was never written."""

    def change(inputs: Inputs) -> Inputs:
        cache: KVCache = inputs["cache"]
        if cache.length < 2:
            return {}
        order = [*range(cache.length - 1), cache.length - 2]
        return {"cache": KVCache(cache.key_BSKD[:, order], cache.value_BSKD[:, order])}

    def call(**inputs: Any) -> Any:
        return function(**{**inputs, **change(inputs)})

    return call


def _attention_with(**fields: Any) -> Callable[[Inputs], Inputs]:
    """The attention's config with other values in these fields."""

    def change(inputs: Inputs) -> Inputs:
        config = inputs["config"]
        if isinstance(config, LayerConfig):
            return {"config": replace(config, attention=replace(config.attention, **fields))}
        return {"config": replace(config, **fields)}

    return change


def _slopes_negated(inputs: Inputs) -> Inputs:
    weights = inputs["weights"]
    attention: AttentionWeights = weights.attention if isinstance(weights, LayerWeights) else weights
    slope_H = attention.alibi_slope_H
    attention = replace(attention, alibi_slope_H=None if slope_H is None else -slope_H)
    return {"weights": replace(weights, attention=attention) if isinstance(weights, LayerWeights) else attention}


def _other_span(inputs: Inputs) -> Inputs:
    config: AttentionConfig = inputs["config"]
    other = next(span for span in QkNormSpan if span is not config.qk_norm_span)
    return {"config": replace(config, qk_norm_span=other, qk_norm_rotated=False)}


def _normed_after_rotating(
    *, x_BTM: Tensor, weights: AttentionWeights, config: AttentionConfig, cache: KVCache
) -> tuple[Tensor, KVCache]:
    """The norms of queries and keys wait until these have rotated."""
    waiting: list[tuple[NormWeights, NormConfig]] = []

    def later(x: Tensor, part: NormWeights, of: NormConfig) -> Tensor:
        waiting.append((part, of))
        return x

    def rotate_then_norm(x_BTHD: Tensor, *turn: Any) -> Tensor:
        turned = rotate(x_BTHD, *turn)
        if not waiting:
            return turned
        part, of = waiting.pop(0)
        return norm(turned, part, of) if part.gain_M.ndim == 2 else norm(turned.flatten(2), part, of).view(turned.shape)

    components = DEFAULT if config.rotary is None else _with(norm=later, rotate=rotate_then_norm)
    return self_attention(x_BTM, weights, config, cache, components)


def _norms_swapped(inputs: Inputs) -> Inputs:
    weights: LayerWeights = inputs["weights"]
    return {"weights": replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)}


def _sum_normed_or_not(inputs: Inputs) -> Inputs:
    """The norm acts before the addition where it should act after it, and the other way round."""
    config: LayerConfig = inputs["config"]
    after, on_sum = NormPlacement.OUTPUT_NORM, NormPlacement.POST_NORM
    before, on_stream = NormPlacement.PRE_NORM, NormPlacement.STREAM_NORM
    other = {on_sum: after, after: on_sum, on_stream: before}
    return {"config": replace(config, norm_placement=other.get(config.norm_placement, config.norm_placement))}


def _one_after_the_other(inputs: Inputs) -> Inputs:
    """The MLP reads the stream with the attention added, though it stands beside it."""
    config, weights = inputs["config"], inputs["weights"]
    norms = {"mlp_norm": weights.mlp_norm or weights.attention_norm}
    shared = config.residual is Residual.PARALLEL_SHARED_NORM
    return {
        "config": replace(config, residual=Residual.SEQUENTIAL),
        "weights": replace(weights, **norms) if shared else weights,
    }


def _side_by_side(inputs: Inputs) -> Inputs:
    config: LayerConfig = inputs["config"]
    before = config.norm_placement is NormPlacement.PRE_NORM and config.residual is Residual.SEQUENTIAL
    return {"config": replace(config, residual=Residual.PARALLEL)} if before else {}


def _residual_not_scaled(inputs: Inputs) -> Inputs:
    return {"config": replace(inputs["config"], residual_scale=1.0)}


def _output_norms_forgotten(inputs: Inputs) -> Inputs:
    return {"weights": replace(inputs["weights"], attention_output_norm=None, mlp_output_norm=None)}


def _normed_residual(
    *, x_BTM: Tensor, weights: LayerWeights, config: LayerConfig, cache: KVCache
) -> tuple[Tensor, KVCache]:
    """The normalized stream is added instead of the stream itself."""
    normed = x_BTM if weights.attention_norm is None else norm(x_BTM, weights.attention_norm, config.norm)
    out, grown = layer(x_BTM, weights, config, cache, DEFAULT)
    return out - x_BTM + normed, grown


def _sinks_forgotten(inputs: Inputs) -> Inputs:
    weights = inputs["weights"]
    if isinstance(weights, LayerWeights):
        return {"weights": replace(weights, attention=replace(weights.attention, sink_H=None))}
    return {"weights": replace(weights, sink_H=None)}


def _clamp_and_offset_forgotten(inputs: Inputs) -> Inputs:
    config: LayerConfig = inputs["config"]
    if isinstance(config.mlp, MoeConfig):
        expert = replace(config.mlp.expert, clamp=None, up_offset=0.0)
        return {"config": replace(config, mlp=replace(config.mlp, expert=expert))}
    return {"config": replace(config, mlp=replace(config.mlp, clamp=None, up_offset=0.0))}


def _moe_component(function: Function) -> Function:
    """A block of experts, which takes keywords, as a component; it routes and feeds by itself."""

    def call(x_BTM: Tensor, weights: Any, config: MoeConfig, *, linear: Any, mlp: Any, route: Any) -> Any:
        return function(x_BTM=x_BTM, weights=weights, config=config)

    return call


def _next_best(logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None = None, /) -> Routing:
    """The last choice is the best expert that was left, where one is."""
    if config.top_k == config.experts:
        return route(logit_TE, config, choice_bias_E)
    more_TK = route(logit_TE, replace(config, top_k=config.top_k + 1), choice_bias_E).expert_TK
    expert_TK = torch.cat([more_TK[:, : config.top_k - 1], more_TK[:, -1:]], 1)
    return Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))


_WRONG_ATTENTION = {
    "sinks_forgotten": _sinks_forgotten,
    "window_ignored": _attention_with(window=None),
    "later_tokens_hidden": _attention_with(causal=True),
    "softcap_forgotten": _attention_with(softcap=None),
    "qkv_not_clipped": _attention_with(qkv_clip=None),
    "qk_norm_forgotten": _attention_with(qk_norm=None),
    "slopes_negated": _slopes_negated,
}


def _wrong_attention(function: Function) -> dict[str, Function]:
    return {name: changed(function, change) for name, change in _WRONG_ATTENTION.items()}


def _causal(case: Case) -> Case:
    return replace(case, options={**case.options, "causal": True})


def alone_and_in_pieces(op: Op, function: Function, case: Case) -> None:
    """Passing each sequence alone, in up to four pieces, stays within the budget of passing all at once.

    The first piece and the last are one token; no token sees a later one.
    """
    case = _causal(case)
    tokens = case.n.T
    borders = sorted({0, min(1, tokens), tokens // 2, tokens - 1, tokens})

    def piece_by_piece(*, x_BTM: Tensor, cache: KVCache, **rest: Any) -> tuple[Tensor, KVCache]:
        outs, caches = [], []
        for b in range(len(x_BTM)):
            mine, pieces = KVCache(cache.key_BSKD[b : b + 1], cache.value_BSKD[b : b + 1]), []
            for start, end in pairwise(borders):
                out, mine = function(x_BTM=x_BTM[b : b + 1, start:end], cache=mine, **rest)
                pieces.append(out)
            outs.append(torch.cat(pieces, 1))
            caches.append(mine)
        grown = [torch.cat([getattr(each, name) for each in caches]) for name in ("key_BSKD", "value_BSKD")]
        return torch.cat(outs), KVCache(*grown)

    verdict = op.guarantee.judge(op.trial(piece_by_piece, case, once=True))
    assert not verdict.failed, verdict.complaint


def later_tokens_do_not_matter(op: Op, function: Function, case: Case) -> None:
    """Replacing the last token leaves the bits of all before it as they were, if they see nothing later.

    Not of experts: one serves another number of tokens where the last token leaves it, and may sum in another order.
    """
    case = _causal(case)
    case = replace(case, options={**case.options, "experts": None})
    x_BTM = op.inputs(case)["x_BTM"].clone()
    x_BTM[:, -1] = 1 - x_BTM[:, -1]
    before, after = call(op, function, case)[0], call(op, function, case, x_BTM=x_BTM)[0]
    assert_same_bits([before[:, :-1]], [after[:, :-1]], "causality")


def _projections(n: Any) -> int:
    return int(n.M * n.D * (2 * n.H + 2 * n.K))


def _rest_of_head_stays(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {**after, "D": max(2 * after["J"], 2) + before["D"] - max(2 * before["J"], 2)}


_LARGER = resized(
    {
        "T": (15, 16, 17, 33, 64, 65),
        "S": (15, 16, 17, 63, 64, 65, 128),
        "M": (63, 64, 65, 128, 256),
        "J": (16, 32, 40),
        "F": (63, 64, 65, 128, 300),
        "B": BATCH,
    },
    fit=_rest_of_head_stays,
    far={"S": (257, 513), "F": (513, 1025)},
)

SELF_ATTENTION = Op(
    name="self_attention",
    larger=_LARGER,
    paper="III-D, Fig. 1c (regions 1 and 2)",
    axes="B T S M H K D J",
    reference=partial(self_attention, components=DEFAULT),
    outputs=("B T M", "B S+T K D", "B S+T K D"),
    cases=partial(layer_cases, op="self_attention"),
    inputs=self_attention_inputs,
    guarantee=Budget(rows="B T S+T K", scale=scale_of_self_attention),
    properties=(repeats_itself, alone_and_in_pieces, later_tokens_do_not_matter),
    variants={"summed_otherwise": partial(self_attention, components=_SUMMED_OTHERWISE)},
    mutants={
        **{name: partial(self_attention, components=wrong) for name, wrong in _WRONG_COMPONENTS.items()},
        "stale_cache_row": _stale_row(partial(self_attention, components=DEFAULT)),
        "other_norm_span": changed(partial(self_attention, components=DEFAULT), _other_span),
        "normed_after_rotating": _normed_after_rotating,
        **_wrong_attention(partial(self_attention, components=DEFAULT)),
        "row_3_percent_off": then(partial(self_attention, components=DEFAULT), one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.B * n.T * _projections(n) + 4 * n.B * n.H * n.T * (n.S + n.T) * n.D,
    bytes=lambda n: 4 * (_projections(n) + 2 * n.B * n.T * n.M + 2 * n.B * (n.S + n.T) * n.K * n.D),
    no_fast="compiled into a step of the whole model, its cache written in place: compare_paths judges it",
    conventions={"angles=float32": {"reference": partial(self_attention, components=_FLOAT32_ANGLES)}},
)

LAYER = Op(
    name="layer",
    larger=_LARGER,
    paper="III-D, Fig. 1c",
    axes="B T S M H K D F J",
    reference=partial(layer, components=DEFAULT),
    outputs=("B T M", "B S+T K D", "B S+T K D"),
    cases=partial(layer_cases, op="layer"),
    inputs=layer_inputs,
    guarantee=DecidedBudget(rows="B T S+T K", scale=scale_of_layer),
    properties=(repeats_itself, alone_and_in_pieces, later_tokens_do_not_matter),
    variants={"summed_otherwise": partial(layer, components=_SUMMED_OTHERWISE)},
    mutants={
        **{name: partial(layer, components=wrong) for name, wrong in _WRONG_COMPONENTS.items()},
        "stale_cache_row": _stale_row(partial(layer, components=DEFAULT)),
        **_wrong_attention(partial(layer, components=DEFAULT)),
        "norms_swapped": changed(partial(layer, components=DEFAULT), _norms_swapped),
        "normed_stream_added": _normed_residual,
        "sum_normed_or_not": changed(partial(layer, components=DEFAULT), _sum_normed_or_not),
        "output_norms_forgotten": changed(partial(layer, components=DEFAULT), _output_norms_forgotten),
        "one_after_the_other": changed(partial(layer, components=DEFAULT), _one_after_the_other),
        "side_by_side": changed(partial(layer, components=DEFAULT), _side_by_side),
        "clamp_and_offset_forgotten": changed(partial(layer, components=DEFAULT), _clamp_and_offset_forgotten),
        "next_best_expert": partial(layer, components=_with(route=_next_best)),
        **{name: partial(layer, components=_with(moe=_moe_component(FAULTS[name]))) for name in _EXPERT_FAULTS},
        "residual_not_scaled": changed(partial(layer, components=DEFAULT), _residual_not_scaled),
        "row_3_percent_off": then(partial(layer, components=DEFAULT), one_row_3_percent_off),
    },
    flops=lambda n: SELF_ATTENTION.flops(n) + 6 * n.B * n.T * n.M * n.F,
    bytes=lambda n: SELF_ATTENTION.bytes(n) + 4 * (3 * n.M * n.F + 4 * n.M),
    no_fast="compiled into a step of the whole model, its cache written in place: compare_paths judges it",
    conventions={"angles=float32": {"reference": partial(layer, components=_FLOAT32_ANGLES)}},
)
