"""A layer, three times: for a decode step, for a prefill and for whole texts. Programs (`steps`) compile them.

Why it is faster: everything between two products is one region for the compiler, which fuses norms, rotations,
activations and additions into the products' neighbors. What it relies on: config, storage and product are constants of
a piece, so that of all conventions only the layer's own are traced.

A layer can be cut where ranks that hold parts of it have to agree: `reduce` is applied to the output of attention and
to that of the MLP, before anything is done with them.

Shapes: R sequences that gain one token, T prompt tokens of one sequence or tokens of N texts, S key positions, M
hidden, H heads, K key/value heads, D head size, F intermediate, C slots of the cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, NormPlacement, QkNormSpan, Residual, Storage
from ..spec.moe import MoeConfig
from .attention import DecodeMask, attend_decode, attend_prefill, attend_varlen, write
from .embedding import Product
from .linear import linear_decode, linear_prefill
from .moe import Mlp, Moe
from .moe import mlp as dense
from .moe import moe as mixture
from .norms import Norm, norm
from .rotary import rotate
from .weights import Layer


class Cache(NamedTuple):
    """One layer's keys and values; sequence b, position p is slot b * capacity + p."""

    key_CKD: Tensor
    value_CKD: Tensor


Table = tuple[Tensor, Tensor] | None
"""cos and sin, or None for a layer without rotary positions."""

Reduce = Callable[[Tensor], Tensor]
"""What makes a sub-layer's output whole where ranks hold parts of it; nothing is fused across it."""


def identity(x: Tensor) -> Tensor:
    """Return x: the reduction on one device."""
    return x


def decode_layer(
    x_RM: Tensor,
    weights: Layer,
    cache: Cache,
    table: Table,
    write_R: Tensor,
    position_R: Tensor,
    slot_S: Tensor,
    mask: DecodeMask,
    *,
    config: LayerConfig,
    storage: Storage,
    product: Product = linear_decode,
    reduce: Reduce = identity,
) -> Tensor:
    """Return what a layer makes of the hidden vectors of one new token for each sequence; its cache gains them."""

    def attend(query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor) -> Tensor:
        write(cache.key_CKD, write_R, key_RKD)
        write(cache.value_CKD, write_R, value_RKD)
        return attend_decode(
            query_RHD,
            *cache,
            mask=mask,
            position_R=position_R,
            slot_S=slot_S,
            scale=config.attention.scale,
            softcap=config.attention.softcap,
            slope_H=weights.slope_H,
            sink_H=weights.sink_H,
        )

    return _layer(x_RM, weights, table, attend, config, storage, product, reduce)


def prefill_layer(
    x_TM: Tensor,
    weights: Layer,
    cache: Cache,
    table: Table,
    write_T: Tensor,
    read_S: Tensor,
    mask_TS: Tensor,
    *,
    config: LayerConfig,
    storage: Storage,
    reduce: Reduce = identity,
) -> Tensor:
    """Return what a layer makes of the hidden vectors of several tokens of one sequence; its cache gains them."""

    def attend(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Tensor:
        write(cache.key_CKD, write_T, key_TKD)
        write(cache.value_CKD, write_T, value_TKD)
        return attend_prefill(
            query_THD,
            *cache,
            slot_S=read_S,
            mask_TS=mask_TS,
            scale=config.attention.scale,
            window=config.attention.window,
            softcap=config.attention.softcap,
            slope_H=weights.slope_H,
            sink_H=weights.sink_H,
        )

    return _layer(x_TM, weights, table, attend, config, storage, linear_prefill, reduce)


def encode_layer(
    x_TM: Tensor,
    weights: Layer,
    table: Table,
    cu_seqlens: Tensor,
    *,
    config: LayerConfig,
    storage: Storage,
    reduce: Reduce = identity,
) -> Tensor:
    """Return what a layer makes of the hidden vectors of whole texts."""

    def attend(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Tensor:
        return attend_varlen(
            query_THD,
            key_TKD,
            value_TKD,
            cu_seqlens=cu_seqlens,
            causal=config.attention.causal,
            scale=config.attention.scale,
            window=config.attention.window,
            softcap=config.attention.softcap,
            slope_H=weights.slope_H,
            sink_H=weights.sink_H,
        )

    return _layer(x_TM, weights, table, attend, config, storage, linear_prefill, reduce)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value of new tokens to mixed values [T, H, D]: attention, wherever earlier ones are kept."""


def layer_with(
    x_TM: Tensor,
    weights: Layer,
    table: Table,
    attend: Attend,
    *,
    config: LayerConfig,
    storage: Storage,
    product: Product,
) -> Tensor:
    """Return what a layer makes of the hidden vectors of new tokens, with an attention of the caller's."""
    return _layer(x_TM, weights, table, attend, config, storage, product, identity)


def _layer(
    x_TM: Tensor,
    weights: Layer,
    table: Table,
    attend: Attend,
    config: LayerConfig,
    storage: Storage,
    product: Product,
    reduce: Reduce,
) -> Tensor:
    """Return the layer's output; `attend` makes mixed values [T, H, D] of query, key and value."""

    def attention(normed_TM: Tensor) -> Tensor:
        query, key, value = _heads(product(normed_TM, weights.qkv, storage), weights, table, config)
        return product(attend(query, key, value).flatten(1), weights.output, storage)

    def mlp(normed_TM: Tensor) -> Tensor:
        if isinstance(config.mlp, MoeConfig):
            assert isinstance(weights.mlp, Moe)
            return mixture(normed_TM, weights.mlp, config.mlp, storage, product)
        assert isinstance(weights.mlp, Mlp)
        return dense(normed_TM, weights.mlp, config.mlp, storage, product)

    return _residual_blocks(x_TM, weights, config, attention, mlp, reduce)


SubLayer = Callable[[Tensor], Tensor]
"""Attention or MLP: rows [T, M] to what is added to them, before it is reduced."""


def _residual_blocks(
    x_TM: Tensor, weights: Layer, config: LayerConfig, attention: SubLayer, mlp: SubLayer, reduce: Reduce
) -> Tensor:
    """Return x after both sub-layers with their norms and additions.

    The config is a constant, so one of these forms is traced. Parallel sub-layers are added up and reduced once.
    """
    read_TM = _normed(x_TM, weights.attention_norm, config)
    if config.residual is not Residual.SEQUENTIAL:
        mlp_read_TM = read_TM if weights.mlp_norm is None else _normed(x_TM, weights.mlp_norm, config)
        return _sum(x_TM, reduce(attention(read_TM) + mlp(mlp_read_TM)), config)
    if config.norm_placement is NormPlacement.POST_NORM:
        x_TM = _normed(_sum(x_TM, reduce(attention(read_TM)), config), weights.attention_output_norm, config)
        return _normed(_sum(x_TM, reduce(mlp(x_TM)), config), weights.mlp_output_norm, config)
    if config.norm_placement is NormPlacement.STREAM_NORM:
        read_TM = _normed(_sum(read_TM, reduce(attention(read_TM)), config), weights.mlp_norm, config)
        return _sum(read_TM, reduce(mlp(read_TM)), config)
    x_TM = _sum(x_TM, _normed(reduce(attention(read_TM)), weights.attention_output_norm, config), config)
    read_TM = _normed(x_TM, weights.mlp_norm, config)
    return _sum(x_TM, _normed(reduce(mlp(read_TM)), weights.mlp_output_norm, config), config)


def _sum(x_TM: Tensor, out_TM: Tensor, config: LayerConfig) -> Tensor:
    return x_TM + out_TM if config.residual_scale == 1.0 else x_TM + config.residual_scale * out_TM


def _normed(x_TM: Tensor, weights: Norm | None, config: LayerConfig) -> Tensor:
    return x_TM if weights is None else norm(x_TM, weights.gain_M, weights.bias_M, config.norm)


def _heads(qkv_TN: Tensor, weights: Layer, table: Table, config: LayerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, H, D], key and value [T, K, D] from the merged product: clipped, normed and rotated."""
    attention = config.attention
    if attention.qkv_clip is not None:
        qkv_TN = qkv_TN.clamp(-attention.qkv_clip, attention.qkv_clip)
    qkv_TGD = qkv_TN.view(qkv_TN.shape[0], -1, attention.head_size)
    first_value = attention.heads + attention.kv_heads
    query_key_TGD, value_TKD = qkv_TGD[:, :first_value], qkv_TGD[:, first_value:]
    if not attention.qk_norm_rotated:
        query_key_TGD = _query_key_normed(query_key_TGD, weights, attention)
    if table is not None:
        assert attention.rotary is not None
        query_key_TGD = rotate(query_key_TGD, *table, attention.rotary.layout)
    if attention.qk_norm_rotated:
        query_key_TGD = _query_key_normed(query_key_TGD, weights, attention)
    return query_key_TGD[:, : attention.heads], query_key_TGD[:, attention.heads :], value_TKD


def _query_key_normed(query_key_TGD: Tensor, weights: Layer, attention: AttentionConfig) -> Tensor:
    """Return the heads of queries and keys, normed where there are weights for it."""
    if weights.query_norm is None or weights.key_norm is None:
        return query_key_TGD
    query_THD = _head_normed(query_key_TGD[:, : attention.heads], weights.query_norm, attention)
    key_TKD = _head_normed(query_key_TGD[:, attention.heads :], weights.key_norm, attention)
    return torch.cat((query_THD, key_TKD), 1)


def _head_normed(x_THD: Tensor, weights: Norm, config: AttentionConfig) -> Tensor:
    """Over each head, or over all of them as one row."""
    assert config.qk_norm is not None
    each = x_THD if config.qk_norm_span is QkNormSpan.HEAD else x_THD.flatten(1)
    return norm(each, weights.gain_M, weights.bias_M, config.qk_norm).view(x_THD.shape)
