"""The sizes of what is rounded on the way through a layer and through its attention, to first order.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size, F
intermediate, J rotating pairs.
"""

import torch
from einops import rearrange
from torch import Tensor

from ...reference import attention as attention_file
from ...reference.cache import KVCache, append
from ...reference.components import DEFAULT
from ...reference.layer import self_attention
from ...reference.linear import linear
from ...reference.mlp import mlp
from ...reference.positions import alibi, rotate
from ...spec.config import AttentionConfig, NormPlacement, QkNormSpan, Residual
from ...spec.weights import AttentionWeights, LayerWeights, LinearWeights, NormWeights
from ..case import Inputs
from ..scale import attention_scale, linear_scale, norm_with_scale
from .mlp import mlp_scale
from .positions import rotate_scale

Known = tuple[Tensor, Tensor]
"""A value, and the scale to which it is known."""


def self_attention_with_scale(
    x_BTM: Tensor, scale_x: Tensor, weights: AttentionWeights, config: AttentionConfig, cache: KVCache
) -> list[Tensor]:
    """The scales of the output, the keys and the values; in float64."""
    position_S = torch.arange(cache.length + x_BTM.shape[1])
    position_T = position_S[cache.length :]

    def heads(value: Tensor) -> Tensor:
        return rearrange(value, "b t (h d) -> b t h d", d=config.head_size)

    def projected(part: LinearWeights, part_norm: NormWeights | None, turns: bool) -> Known:
        known = linear(x_BTM, part), linear_scale(scale_x, part)
        if config.qkv_clip is not None:
            known = known[0].clamp(-config.qkv_clip, config.qkv_clip), known[1]
        if config.qk_norm is not None and part_norm is not None:
            known = _head_norm_with_scale(*known, part_norm, config)
        value, scale = (heads(each) for each in known)
        if turns and config.rotary is not None and weights.rotary_frequency_J is not None:
            turn = (position_T, weights.rotary_frequency_J, config.rotary.layout, config.rotary.attention_factor)
            value, scale = rotate(value, *turn), rotate_scale(scale, *turn)
        return value, scale

    query, scale_q = projected(weights.query, weights.query_norm, turns=True)
    key, scale_k = projected(weights.key, weights.key_norm, turns=True)
    value, scale_v = projected(weights.value, None, turns=False)
    slope_H = weights.alibi_slope_H
    grown = append(cache, key, value)
    scales = append(KVCache(cache.key_BSKD.abs(), cache.value_BSKD.abs()), scale_k, scale_v)
    scale_out = attention_scale(
        query,
        grown.key_BSKD,
        grown.value_BSKD,
        visible_TS=attention_file.visible(position_T, position_S, causal=config.causal, window=config.window),
        scale=config.scale,
        softcap=config.softcap,
        bias_HTS=None if slope_H is None else alibi(slope_H, position_T, position_S),
        scales=(scale_q, scales.key_BSKD, scales.value_BSKD),
    )
    out = linear_scale(rearrange(scale_out, "b t h d -> b t (h d)"), weights.output)
    return [out, scales.key_BSKD, scales.value_BSKD]


def _head_norm_with_scale(value: Tensor, scale: Tensor, weights: NormWeights, config: AttentionConfig) -> Known:
    assert config.qk_norm is not None
    if config.qk_norm_span is QkNormSpan.ALL_HEADS:
        return norm_with_scale(value, scale, weights, config.qk_norm)
    apart, size = "b t (h d) -> b t h d", config.head_size
    bias_HD = None if weights.bias_M is None else weights.bias_M.view(-1, size)
    of_heads = NormWeights(gain_M=weights.gain_M.view(-1, size), bias_M=bias_HD)
    normed = norm_with_scale(rearrange(value, apart, d=size), rearrange(scale, apart, d=size), of_heads, config.qk_norm)
    return normed[0].flatten(2), normed[1].flatten(2)


def scale_of_self_attention(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return self_attention_with_scale(
        exact["x_BTM"], exact["x_BTM"].abs(), exact["weights"], exact["config"], exact["cache"]
    )


def scale_of_layer(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    config, cache = exact["config"], exact["cache"]
    weights: LayerWeights = exact["weights"]
    x: Known = exact["x_BTM"], exact["x_BTM"].abs()
    of_cache: list[Tensor] = []

    def normed(known: Known, part: NormWeights | None) -> Known:
        return known if part is None else norm_with_scale(*known, part, config.norm)

    def attended(known: Known) -> Known:
        of_attention = self_attention_with_scale(*known, weights.attention, config.attention, cache)
        of_cache.extend(of_attention[1:])
        return self_attention(known[0], weights.attention, config.attention, cache, DEFAULT)[0], of_attention[0]

    def fed(known: Known) -> Known:
        return mlp(known[0], weights.mlp, config.mlp), mlp_scale(known[1], weights.mlp)

    def added(one: Known, other: Known) -> Known:
        return one[0] + config.residual_scale * other[0], one[1] + config.residual_scale * other[1]

    def joined(one: Known, other: Known, part: NormWeights | None) -> Known:
        if config.norm_placement is NormPlacement.POST_NORM:
            return normed(added(one, other), part)
        return added(one, normed(other, part))

    on_stream = config.norm_placement is NormPlacement.STREAM_NORM
    read = normed(x, weights.attention_norm)
    if config.residual is Residual.SEQUENTIAL:
        middle = joined(read if on_stream else x, attended(read), weights.attention_output_norm)
        second = normed(middle, weights.mlp_norm)
        out = joined(second if on_stream else middle, fed(second), weights.mlp_output_norm)
    else:
        out = added(added(x, attended(read)), fed(normed(x, weights.mlp_norm) if weights.mlp_norm else read))
    return [out[1], *of_cache]
