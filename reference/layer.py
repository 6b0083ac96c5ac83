"""One transformer layer: attention and the MLP, each reading the stream and adding to it.

With f first the attention and then the MLP, s a constant, and the norms where `NormPlacement` says:

    PRE_NORM      x = x + s f(norm(x))          SANDWICH_NORM   x = x + s norm(f(norm(x)))
    OUTPUT_NORM   x = x + s norm(f(x))          POST_NORM       x = norm(x + s f(x))
    STREAM_NORM   x = norm(x) + s f(norm(x))

or both at once, from the same x, with two norms or a shared one (`Residual`; Wang, Komatsuzaki 2021):

    x = x + s attention(norm(x)) + s mlp(norm'(x))

    attention(n) = output(attend(rotate(q), rotate(k), v)),   q, k, v = query(n), key(n), value(n)

Some models clip q, k and v, and some normalize q and k, in this order (Dehghani et al. 2023, section 2).

Norm, linear maps, rotation, attention, MLP, mixture and router are `Components`; swap one to try an idea on a real
model.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, MlpConfig, NormPlacement, QkNormSpan, Residual
from ..spec.errors import ConfigError
from ..spec.moe import MoeConfig
from ..spec.weights import AttentionWeights, LayerWeights, MlpWeights, MoeWeights, NormWeights
from .attention import visible
from .cache import KVCache, append
from .positions import alibi

if TYPE_CHECKING:
    from .components import Components


def layer(
    x_BTM: Tensor, weights: LayerWeights, config: LayerConfig, cache: KVCache, components: Components
) -> tuple[Tensor, KVCache]:
    """Pass T tokens that follow the cache's S; returns [B, T, M] and the cache of S + T tokens."""
    read_BTM = normed(x_BTM, weights.attention_norm, config, components)
    x_BTM = added_to(x_BTM, read_BTM, config)
    attended_BTM, cache = self_attention(read_BTM, weights.attention, config.attention, cache, components)
    if config.residual is Residual.SEQUENTIAL:
        x_BTM = joined(x_BTM, attended_BTM, weights.attention_output_norm, config, components)
        read_BTM = normed(x_BTM, weights.mlp_norm, config, components)
        x_BTM = added_to(x_BTM, read_BTM, config)
        fed_BTM = feed_forward(read_BTM, weights.mlp, config.mlp, components)
        return joined(x_BTM, fed_BTM, weights.mlp_output_norm, config, components), cache
    if config.residual is Residual.PARALLEL:
        read_BTM = normed(x_BTM, weights.mlp_norm, config, components)
    fed_BTM = feed_forward(read_BTM, weights.mlp, config.mlp, components)
    return x_BTM + config.residual_scale * attended_BTM + config.residual_scale * fed_BTM, cache


def feed_forward(
    x_BTM: Tensor, weights: MlpWeights | MoeWeights, config: MlpConfig | MoeConfig, components: Components
) -> Tensor:
    """Feed each token to the layer's MLP, or to the experts in its place.

    Raises `ConfigError` where the weights are not of the config's kind.
    """
    match weights, config:
        case MlpWeights(), MlpConfig():
            return components.mlp(x_BTM, weights, config, linear=components.linear)
        case MoeWeights(), MoeConfig():
            return components.moe(
                x_BTM, weights, config, linear=components.linear, mlp=components.mlp, route=components.route
            )
        case _:
            raise ConfigError(f"the weights are {type(weights).__name__}, but the config is {type(config).__name__}")


def normed(x_BTM: Tensor, weights: NormWeights | None, config: LayerConfig, components: Components) -> Tensor:
    """Through the norm, where there is one."""
    return x_BTM if weights is None else components.norm(x_BTM, weights, config.norm)


def added_to(x_BTM: Tensor, read_BTM: Tensor, config: LayerConfig) -> Tensor:
    """What a sub-layer's output is added to: the stream, which may become what the sub-layer reads."""
    return read_BTM if config.norm_placement is NormPlacement.STREAM_NORM else x_BTM


def joined(
    x_BTM: Tensor, out_BTM: Tensor, weights: NormWeights | None, config: LayerConfig, components: Components
) -> Tensor:
    """The stream with a sub-layer's output added, either of them normalized as the placement says."""
    if config.norm_placement is NormPlacement.POST_NORM:
        return normed(x_BTM + config.residual_scale * out_BTM, weights, config, components)
    return x_BTM + config.residual_scale * normed(out_BTM, weights, config, components)


def self_attention(
    x_BTM: Tensor, weights: AttentionWeights, config: AttentionConfig, cache: KVCache, components: Components
) -> tuple[Tensor, KVCache]:
    """From query, key and value projections to the output's; returns [B, T, M] and the cache of S + T tokens."""
    query_BTHD = heads(components.linear(x_BTM, weights.query), weights.query_norm, config, components)
    key_BTKD = heads(components.linear(x_BTM, weights.key), weights.key_norm, config, components)
    value_BTKD = heads(components.linear(x_BTM, weights.value), None, config, components)
    return attend(query_BTHD, key_BTKD, value_BTKD, weights, config, cache, components)


def attend(
    query_BTHD: Tensor,
    key_BTKD: Tensor,
    value_BTKD: Tensor,
    weights: AttentionWeights,
    config: AttentionConfig,
    cache: KVCache,
    components: Components,
) -> tuple[Tensor, KVCache]:
    """From projected heads to the output projection; returns [B, T, M] and the cache of S + T tokens."""
    position_S = torch.arange(cache.length + query_BTHD.shape[1], device=query_BTHD.device)
    position_T = position_S[cache.length :]
    if config.rotary is not None and weights.rotary_frequency_J is not None:
        turn = (position_T, weights.rotary_frequency_J, config.rotary.layout, config.rotary.attention_factor)
        query_BTHD, key_BTKD = components.rotate(query_BTHD, *turn), components.rotate(key_BTKD, *turn)
    if config.qk_norm is not None and config.qk_norm_rotated:
        query_BTHD = each_head_normed(query_BTHD, weights.query_norm, config, components)
        key_BTKD = each_head_normed(key_BTKD, weights.key_norm, config, components)
    shaping: dict[str, Any] = {} if config.softcap is None else {"softcap": config.softcap}
    if weights.sink_H is not None:
        shaping["sink_H"] = weights.sink_H
    if weights.alibi_slope_H is not None:
        shaping["bias_HTS"] = alibi(weights.alibi_slope_H, position_T, position_S)

    cache = append(cache, key_BTKD, value_BTKD)
    out_BTHD = components.attention(
        query_BTHD,
        cache.key_BSKD,
        cache.value_BSKD,
        visible_TS=visible(position_T, position_S, causal=config.causal, window=config.window),
        scale=config.scale,
        **shaping,
    )
    return components.linear(rearrange(out_BTHD, "b t h d -> b t (h d)"), weights.output), cache


def heads(x_BTN: Tensor, weights: NormWeights | None, config: AttentionConfig, components: Components) -> Tensor:
    """A projection [B, T, H * D] as heads [B, T, H, D], clipped, and normalized where there are weights for it.

    Where the norm follows the rotation, it is left to `attend`.
    """
    if config.qkv_clip is not None:
        x_BTN = x_BTN.clamp(-config.qkv_clip, config.qkv_clip)
    x_BTHD = rearrange(x_BTN, "b t (h d) -> b t h d", d=config.head_size)
    if config.qk_norm is None or weights is None or config.qk_norm_rotated:
        return x_BTHD
    if config.qk_norm_span is QkNormSpan.ALL_HEADS:
        normed_BTN = components.norm(x_BTN, weights, config.qk_norm)
        return rearrange(normed_BTN, "b t (h d) -> b t h d", d=config.head_size)
    return each_head_normed(x_BTHD, weights, config, components)


def each_head_normed(
    x_BTHD: Tensor, weights: NormWeights | None, config: AttentionConfig, components: Components
) -> Tensor:
    """Normalize the D elements of every head by themselves, with gains of its own."""
    assert config.qk_norm is not None
    assert weights is not None
    gain_HD = rearrange(weights.gain_M, "(h d) -> h d", d=config.head_size)
    bias_HD = None if weights.bias_M is None else rearrange(weights.bias_M, "(h d) -> h d", d=config.head_size)
    return components.norm(x_BTHD, NormWeights(gain_M=gain_HD, bias_M=bias_HD), config.qk_norm)
