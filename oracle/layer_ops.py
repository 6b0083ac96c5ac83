"""Records of the composed parts: self_attention, layer.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size, F
intermediate, J rotating pairs.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..reference import attention as attention_file
from ..reference.cache import KVCache, append
from ..reference.components import DEFAULT, Components
from ..reference.layer import layer, self_attention
from ..reference.linear import linear
from ..reference.norms import norm
from ..reference.positions import rotate
from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RotaryConfig,
    RotaryLayout,
)
from ..spec.weights import AttentionWeights, LayerWeights, LinearWeights
from .attention_ops import ATTENTION
from .budget import Budget
from .case import DTYPES, UNMASKED, Case, Inputs, Picker, activations
from .laws import assert_same_bits, call, repeats_itself
from .mlp_ops import MLP, mlp_scale
from .models import RandomSource
from .op import Function, Op
from .position_ops import ROTATE, rotate_scale
from .scale import attention_scale, linear_scale, norm_scale
from .variants import changed, one_row_3_percent_off, permutation, then


def layer_cases(pick: Picker, op: str) -> Case:
    kv_heads, pairs = pick.integer(1, 2), pick.integer(0, 3)
    return Case(
        op=op,
        sizes={
            "B": pick.integer(1, 2),
            "T": pick.integer(1, 3),
            "S": pick.integer(0, 4),
            "M": pick.integer(2, 12),
            "H": kv_heads * pick.integer(1, 3),
            "K": kv_heads,
            "D": 2 * max(pairs, 1) + 2 * pick.integer(0, 1),
            "F": pick.integer(1, 12),
            "J": pairs,
        },
        options={
            "norm": pick.choice([kind.value for kind in NormKind]),
            "layout": pick.choice([layout.value for layout in RotaryLayout]),
            "window": pick.choice([None, 1, 2, 4]),
            "kind": pick.choice([kind.value for kind in Activation]),
            "gated": pick.choice([True, False]),
            "bias": pick.choice([False, True]),
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def layer_config(case: Case) -> LayerConfig:
    n, options = case.n, case.options
    bias = bool(options["bias"])
    window = options["window"]
    layout = RotaryLayout(str(options["layout"]))
    return LayerConfig(
        norm=NormConfig(kind=NormKind(str(options["norm"])), epsilon=1e-5),
        attention=AttentionConfig(
            heads=n.H,
            kv_heads=n.K,
            head_size=n.D,
            scale=n.D**-0.5,
            window=None if window is None else int(window),
            rotary=RotaryConfig(layout=layout, size=2 * n.J) if n.J else None,
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpConfig(width=n.F, activation=Activation(str(options["kind"])), gated=bool(options["gated"]), bias=bias),
    )


def model_config(config: LayerConfig, hidden: int) -> ModelConfig:
    return ModelConfig(
        family="random",
        hidden=hidden,
        vocabulary=2,
        context=64,
        layers=(config,),
        final_norm=config.norm,
        learned_positions=False,
        head=Head.TIED,
    )


def layer_inputs(case: Case) -> Inputs:
    n, config = case.n, layer_config(case)
    cache = KVCache(*(activations(case, name, n.B, n.S, n.K, n.D, large=3) for name in ("old keys", "old values")))
    return {
        "x_BTM": activations(case, "x", n.B, n.T, n.M, large=5),
        "weights": RandomSource(model_config(config, n.M), case.seed, case.dtype).layer(0),
        "config": config,
        "cache": cache,
    }


def self_attention_inputs(case: Case) -> Inputs:
    inputs = layer_inputs(replace(case, op="layer"))
    return {**inputs, "weights": inputs["weights"].attention, "config": inputs["config"].attention}


def self_attention_with_scale(
    x_BTM: Tensor, scale_x: Tensor, weights: AttentionWeights, config: AttentionConfig, cache: KVCache
) -> list[Tensor]:
    """The scales of the output, the keys and the values; in float64."""
    position_S = torch.arange(cache.length + x_BTM.shape[1])
    position_T = position_S[cache.length :]

    def heads(value: Tensor) -> Tensor:
        return rearrange(value, "b t (h d) -> b t h d", d=config.head_size)

    def projected(part: LinearWeights, turns: bool) -> tuple[Tensor, Tensor]:
        value, scale = heads(linear(x_BTM, part)), heads(linear_scale(scale_x, part))
        if turns and config.rotary is not None and weights.rotary_frequency_J is not None:
            value = rotate(value, position_T, weights.rotary_frequency_J, config.rotary.layout)
            scale = rotate_scale(scale, position_T, weights.rotary_frequency_J, config.rotary.layout)
        return value, scale

    query, scale_q = projected(weights.query, turns=True)
    key, scale_k = projected(weights.key, turns=True)
    value, scale_v = projected(weights.value, turns=False)
    grown = append(cache, key, value)
    scales = append(KVCache(cache.key_BSKD.abs(), cache.value_BSKD.abs()), scale_k, scale_v)
    scale_out = attention_scale(
        query,
        grown.key_BSKD,
        grown.value_BSKD,
        visible_TS=attention_file.visible(position_T, position_S, window=config.window),
        scale=config.scale,
        scales=(scale_q, scales.key_BSKD, scales.value_BSKD),
    )
    out = linear_scale(rearrange(scale_out, "b t h d -> b t (h d)"), weights.output)
    return [out, scales.key_BSKD, scales.value_BSKD]


def _self_attention_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return self_attention_with_scale(
        exact["x_BTM"], exact["x_BTM"].abs(), exact["weights"], exact["config"], exact["cache"]
    )


def _layer_scale(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    x_BTM, config, cache = exact["x_BTM"], exact["config"], exact["cache"]
    weights: LayerWeights = exact["weights"]
    normed = norm(x_BTM, weights.attention_norm, config.norm)
    scale_normed = norm_scale(x_BTM, x_BTM.abs(), weights.attention_norm, config.norm)
    of_attention = self_attention_with_scale(normed, scale_normed, weights.attention, config.attention, cache)
    middle = x_BTM + self_attention(normed, weights.attention, config.attention, cache, DEFAULT)[0]
    scale_middle = x_BTM.abs() + of_attention[0]
    scale_normed = norm_scale(middle, scale_middle, weights.mlp_norm, config.norm)
    return [scale_middle + mlp_scale(scale_normed, weights.mlp), *of_attention[1:]]


def _with(**components: Any) -> Components:
    return replace(DEFAULT, **components)


def _as_component(function: Function) -> Function:
    """An op's variant, which takes keywords, as a component, which takes positions."""

    def call(query: Tensor, key: Tensor, value: Tensor, *, visible_TS: Tensor, scale: float) -> Any:
        return function(query_BTHD=query, key_BSKD=key, value_BSKD=value, visible_TS=visible_TS, scale=scale)

    return call


def _rotate_component(function: Function) -> Function:
    def call(x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout) -> Any:
        return function(x_BTHD=x_BTHD, position_T=position_T, frequency_J=frequency_J, layout=layout)

    return call


def _mlp_component(function: Function) -> Function:
    def call(x_BTM: Tensor, weights: Any, config: MlpConfig, *, linear: Any) -> Any:
        return function(x_BTM=x_BTM, weights=weights, config=config)

    return call


def _linear_shuffled(x: Tensor, weights: LinearWeights) -> Tensor:
    order = permutation(x.shape[-1])
    return linear(x[..., order], LinearWeights(weight_NI=weights.weight_NI[:, order], bias_N=weights.bias_N))


_SUMMED_OTHERWISE = _with(
    attention=_as_component(ATTENTION.right["running_softmax"]),
    rotate=_rotate_component(ROTATE.right["partner"]),
    mlp=_mlp_component(MLP.right["wide"]),
    linear=_linear_shuffled,
)
_WRONG_COMPONENTS = {
    "not_scaled": _with(attention=_as_component(ATTENTION.wrong["not_scaled"])),
    "mask_off_by_one": _with(attention=_as_component(ATTENTION.wrong["mask_off_by_one"])),
    "heads_grouped_by_modulo": _with(attention=_as_component(ATTENTION.wrong["heads_grouped_by_modulo"])),
    "softmax_not_normalised": _with(attention=_as_component(ATTENTION.wrong["softmax_not_normalised"])),
    "halves_swapped": _with(rotate=_rotate_component(ROTATE.wrong["halves_swapped"])),
    "position_off_by_one_from_the_second_token": _with(rotate=_rotate_component(ROTATE.wrong["one_position_for_all"])),
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


def _window_ignored(inputs: Inputs) -> Inputs:
    config = inputs["config"]
    if isinstance(config, LayerConfig):
        return {"config": replace(config, attention=replace(config.attention, window=None))}
    return {"config": replace(config, window=None)}


def _norms_swapped(inputs: Inputs) -> Inputs:
    weights: LayerWeights = inputs["weights"]
    return {"weights": replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)}


def _normed_residual(
    *, x_BTM: Tensor, weights: LayerWeights, config: LayerConfig, cache: KVCache
) -> tuple[Tensor, KVCache]:
    """The normalised stream is added instead of the stream itself."""
    normed = norm(x_BTM, weights.attention_norm, config.norm)
    out, grown = layer(x_BTM, weights, config, cache, DEFAULT)
    return out - x_BTM + normed, grown


def pieces_are_the_whole(op: Op, function: Function, case: Case) -> None:
    """Passing the tokens one at a time stays within the budget of passing them at once."""

    def in_pieces(*, x_BTM: Tensor, cache: KVCache, **rest: Any) -> tuple[Tensor, KVCache]:
        outs = []
        for t in range(x_BTM.shape[1]):
            out, cache = function(x_BTM=x_BTM[:, t : t + 1], cache=cache, **rest)
            outs.append(out)
        return torch.cat(outs, 1), cache

    verdict = op.guarantee.judge(op.trial(in_pieces, case))
    assert not verdict.failed, verdict.complaint


def later_tokens_do_not_matter(op: Op, function: Function, case: Case) -> None:
    """Replacing the last token leaves the bits of all before it as they were."""
    x_BTM = op.inputs(case)["x_BTM"].clone()
    x_BTM[:, -1] = 1 - x_BTM[:, -1]
    before, after = call(op, function, case)[0], call(op, function, case, x_BTM=x_BTM)[0]
    assert_same_bits([before[:, :-1]], [after[:, :-1]], "causality")


def first_sequence_alone(op: Op, function: Function, case: Case) -> None:
    """A sequence alone stays within the budget of the same sequence in a batch."""

    def one_by_one(*, x_BTM: Tensor, cache: KVCache, **rest: Any) -> tuple[Tensor, KVCache]:
        outs = []
        for b in range(len(x_BTM)):
            mine = KVCache(cache.key_BSKD[b : b + 1], cache.value_BSKD[b : b + 1])
            outs.append(function(x_BTM=x_BTM[b : b + 1], cache=mine, **rest))
        grown = [torch.cat([getattr(c, name) for _, c in outs]) for name in ("key_BSKD", "value_BSKD")]
        return torch.cat([out for out, _ in outs]), KVCache(*grown)

    verdict = op.guarantee.judge(op.trial(one_by_one, case))
    assert not verdict.failed, verdict.complaint


def _projections(n: Any) -> int:
    return int(n.M * n.D * (2 * n.H + 2 * n.K))


SELF_ATTENTION = Op(
    name="self_attention",
    paper="III-D, Fig. 1c (regions 1 and 2)",
    axes="B T S M H K D J",
    reference=partial(self_attention, components=DEFAULT),
    outputs=("B T M", "B S+T K D", "B S+T K D"),
    cases=partial(layer_cases, op="self_attention"),
    inputs=self_attention_inputs,
    guarantee=Budget(rows="B T S+T K", scale=_self_attention_scale),
    properties=(repeats_itself, pieces_are_the_whole, later_tokens_do_not_matter, first_sequence_alone),
    right={"summed_otherwise": partial(self_attention, components=_SUMMED_OTHERWISE)},
    wrong={
        **{name: partial(self_attention, components=wrong) for name, wrong in _WRONG_COMPONENTS.items()},
        "stale_cache_row": _stale_row(partial(self_attention, components=DEFAULT)),
        "window_ignored": changed(partial(self_attention, components=DEFAULT), _window_ignored),
        "row_3_percent_off": then(partial(self_attention, components=DEFAULT), one_row_3_percent_off),
    },
    flops=lambda n: 2 * n.B * n.T * _projections(n) + 4 * n.B * n.H * n.T * (n.S + n.T) * n.D,
    bytes=lambda n: 4 * (_projections(n) + 2 * n.B * n.T * n.M + 2 * n.B * (n.S + n.T) * n.K * n.D),
    no_fast="compiled into a step of the whole model, its cache written in place: compare_paths judges it",
)

LAYER = Op(
    name="layer",
    paper="III-D, Fig. 1c",
    axes="B T S M H K D F J",
    reference=partial(layer, components=DEFAULT),
    outputs=("B T M", "B S+T K D", "B S+T K D"),
    cases=partial(layer_cases, op="layer"),
    inputs=layer_inputs,
    guarantee=Budget(rows="B T S+T K", scale=_layer_scale),
    properties=(repeats_itself, pieces_are_the_whole, later_tokens_do_not_matter, first_sequence_alone),
    right={"summed_otherwise": partial(layer, components=_SUMMED_OTHERWISE)},
    wrong={
        **{name: partial(layer, components=wrong) for name, wrong in _WRONG_COMPONENTS.items()},
        "stale_cache_row": _stale_row(partial(layer, components=DEFAULT)),
        "window_ignored": changed(partial(layer, components=DEFAULT), _window_ignored),
        "norms_swapped": changed(partial(layer, components=DEFAULT), _norms_swapped),
        "normed_stream_added": _normed_residual,
        "row_3_percent_off": then(partial(layer, components=DEFAULT), one_row_3_percent_off),
    },
    flops=lambda n: SELF_ATTENTION.flops(n) + 6 * n.B * n.T * n.M * n.F,
    bytes=lambda n: SELF_ATTENTION.bytes(n) + 4 * (3 * n.M * n.F + 4 * n.M),
    no_fast="compiled into a step of the whole model, its cache written in place: compare_paths judges it",
)
