"""The sizes of what is rounded on the way through a layer and through its attention, to first order.

A right implementation may round to the activations' dtype what the reference stores in it, and attention's weights.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size, F
intermediate, J rotating pairs.
"""

import torch
from einops import rearrange
from torch import Tensor

from ...reference import attention as attention_file
from ...reference.cache import KVCache, append
from ...reference.positions import alibi
from ...spec.config import AttentionConfig, NormPlacement, QkNormSpan, Residual
from ...spec.weights import AttentionWeights, LayerWeights, LinearWeights, NormWeights
from ..budget import Sizes
from ..case import Inputs
from ..scale import Known, attention_known, exactly, linear_known, norm_known, sum_known
from .mlp import mlp_known
from .positions import rotate_known


def self_attention_known(
    x_BTM: Known, weights: AttentionWeights, config: AttentionConfig, cache: KVCache
) -> tuple[Known, Known, Known]:
    """The output, and the keys and values of the grown cache."""
    position_S = torch.arange(cache.length + x_BTM.value.shape[1])
    position_T = position_S[cache.length :]

    def projected(part: LinearWeights, part_norm: NormWeights | None, turns: bool) -> Known:
        known = linear_known(x_BTM, part)
        if config.qkv_clip is not None:
            clip = config.qkv_clip
            known = Known(known.value.clamp(-clip, clip), known.wide, known.narrow)
        if config.qk_norm is not None and part_norm is not None:
            known = _head_norm_known(known.stored, part_norm, config)
        known = known.mapped(lambda value: rearrange(value, "b t (h d) -> b t h d", d=config.head_size))
        if turns and config.rotary is not None and weights.rotary_frequency_J is not None:
            turn = (position_T, weights.rotary_frequency_J, config.rotary.layout, config.rotary.attention_factor)
            known = rotate_known(known.stored, *turn)
        return known

    query = projected(weights.query, weights.query_norm, turns=True).stored
    key = projected(weights.key, weights.key_norm, turns=True)
    value = projected(weights.value, None, turns=False)
    slope_H = weights.alibi_slope_H
    grown_key, grown_value = _grown(cache, key, value)
    attended = attention_known(
        query,
        *_grown(cache, key.stored, value.stored),
        visible_TS=attention_file.visible(position_T, position_S, causal=config.causal, window=config.window),
        scale=config.scale,
        softcap=config.softcap,
        bias_HTS=None if slope_H is None else alibi(slope_H, position_T, position_S),
    )
    joined = attended.stored.mapped(lambda out: rearrange(out, "b t h d -> b t (h d)"))
    return linear_known(joined, weights.output), grown_key, grown_value


def _grown(cache: KVCache, key: Known, value: Known) -> tuple[Known, Known]:
    """The cache's own rows are inputs."""
    old = exactly(cache.key_BSKD)
    values = append(cache, key.value, value.value)
    wide = append(KVCache(old.wide, old.wide), key.wide, value.wide)
    narrow = append(KVCache(old.narrow, old.narrow), key.narrow, value.narrow)
    return (
        Known(values.key_BSKD, wide.key_BSKD, narrow.key_BSKD),
        Known(values.value_BSKD, wide.value_BSKD, narrow.value_BSKD),
    )


def _head_norm_known(x: Known, weights: NormWeights, config: AttentionConfig) -> Known:
    assert config.qk_norm is not None
    if config.qk_norm_span is QkNormSpan.ALL_HEADS:
        return norm_known(x, weights, config.qk_norm)
    size = config.head_size
    bias_HD = None if weights.bias_M is None else weights.bias_M.view(-1, size)
    of_heads = NormWeights(gain_M=weights.gain_M.view(-1, size), bias_M=bias_HD)
    apart = x.mapped(lambda value: rearrange(value, "b t (h d) -> b t h d", d=size))
    return norm_known(apart, of_heads, config.qk_norm).mapped(lambda value: value.flatten(2))


def _sizes(known: tuple[Known, ...]) -> list[Sizes]:
    return [Sizes(each.wide, each.narrow / 2) for each in known]  # the reference rounds there too: docs/equal.md


def scale_of_self_attention(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    x_BTM = exactly(exact["x_BTM"])
    return _sizes(self_attention_known(x_BTM, exact["weights"], exact["config"], exact["cache"]))


def scale_of_layer(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    config, cache = exact["config"], exact["cache"]
    weights: LayerWeights = exact["weights"]
    x = exactly(exact["x_BTM"])
    of_cache: list[Known] = []

    def normed(known: Known, part: NormWeights | None) -> Known:
        return known if part is None else norm_known(known, part, config.norm).stored

    def attended(known: Known) -> Known:
        out, *grown = self_attention_known(known, weights.attention, config.attention, cache)
        of_cache.extend(grown)
        return out.stored

    def fed(known: Known) -> Known:
        return mlp_known(known, weights.dense_mlp, config.dense_mlp).stored

    def joined(one: Known, other: Known, part: NormWeights | None) -> Known:
        if config.norm_placement is NormPlacement.POST_NORM:
            return normed(sum_known(one, other, config.residual_scale).stored, part)
        return sum_known(one, normed(other, part), config.residual_scale).stored

    on_stream = config.norm_placement is NormPlacement.STREAM_NORM
    read = normed(x, weights.attention_norm)
    if config.residual is Residual.SEQUENTIAL:
        middle = joined(read if on_stream else x, attended(read), weights.attention_output_norm)
        second = normed(middle, weights.mlp_norm)
        out = joined(second if on_stream else middle, fed(second), weights.mlp_output_norm)
    else:
        of_mlp = fed(normed(x, weights.mlp_norm) if weights.mlp_norm else read)
        out = sum_known(sum_known(x, attended(read), config.residual_scale).stored, of_mlp, config.residual_scale)
    return _sizes((out, *of_cache))
