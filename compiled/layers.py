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


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query [T, H, D], key and value [T, K, D] to mixed values [T, H, D]."""


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
    attend = attend_step(weights, cache, write_R, position_R, slot_S, mask, config.attention)
    return _layer(x_RM, weights, table, attend, config, storage, product, reduce)


def attend_step(
    weights: Layer,
    cache: Cache,
    write_R: Tensor,
    position_R: Tensor,
    slot_S: Tensor,
    mask: DecodeMask,
    config: AttentionConfig,
) -> Attend:
    """Return what attends one new token for each sequence to its cache, after adding it there."""

    def attend(query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor) -> Tensor:
        write(cache.key_CKD, write_R, key_RKD)
        write(cache.value_CKD, write_R, value_RKD)
        return attend_decode(
            query_RHD,
            *cache,
            mask=mask,
            position_R=position_R,
            slot_S=slot_S,
            scale=config.scale,
            softcap=config.softcap,
            slope_H=weights.slope_H,
            sink_H=weights.sink_H,
        )

    return attend


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
    attend = attend_prompt(weights, cache, write_T, read_S, mask_TS, config.attention)
    return _layer(x_TM, weights, table, attend, config, storage, linear_prefill, reduce)


def attend_prompt(
    weights: Layer, cache: Cache, write_T: Tensor, read_S: Tensor, mask_TS: Tensor, config: AttentionConfig
) -> Attend:
    """Return what attends several tokens of one sequence to its cache, after adding them there."""

    def attend(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Tensor:
        write(cache.key_CKD, write_T, key_TKD)
        write(cache.value_CKD, write_T, value_TKD)
        return attend_prefill(
            query_THD,
            *cache,
            slot_S=read_S,
            mask_TS=mask_TS,
            scale=config.scale,
            window=config.window,
            softcap=config.softcap,
            slope_H=weights.slope_H,
            sink_H=weights.sink_H,
        )

    return attend


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
    """Return the layer's output."""

    def attention(normed_TM: Tensor) -> Tensor:
        qkv_TGD = project(normed_TM, weights, config.attention, storage, product)
        return mix(qkv_TGD, weights, table, attend, config.attention, storage, product)

    def mlp(normed_TM: Tensor) -> Tensor:
        return feed(normed_TM, weights, config, storage, product)

    x_TM, part_TM = before_reduce(x_TM, weights, config, attention, mlp)
    if config.residual is Residual.SEQUENTIAL:
        x_TM, read_TM = between_reductions(x_TM, reduce(part_TM), weights, config)
        part_TM = mlp(read_TM)
    return after_reduce(x_TM, reduce(part_TM), weights, config)


SubLayer = Callable[[Tensor], Tensor]
"""Attention or MLP: rows [T, M] to what is added to them, before it is reduced."""


def before_reduce(
    x_TM: Tensor, weights: Layer, config: LayerConfig, attention: SubLayer, mlp: SubLayer
) -> tuple[Tensor, Tensor]:
    """Return what is added to, and the output of attention; parallel sub-layers are added up and reduced once.

    The config is a constant, so one form of these three is traced.
    """
    if config.residual is Residual.SEQUENTIAL:
        return before_experts(x_TM, weights, config, attention)
    read_TM = attention_input(x_TM, weights, config)
    return x_TM, attention(read_TM) + mlp(mlp_input(x_TM, read_TM, weights, config))


def before_experts(x_TM: Tensor, weights: Layer, config: LayerConfig, attention: SubLayer) -> tuple[Tensor, Tensor]:
    """Return the same without the MLP, also where it is parallel: experts are fed on their own."""
    read_TM = attention_input(x_TM, weights, config)
    return read_TM if config.norm_placement is NormPlacement.STREAM_NORM else x_TM, attention(read_TM)


def attention_input(x_TM: Tensor, weights: Layer, config: LayerConfig) -> Tensor:
    """Return what attention reads."""
    return _normed(x_TM, weights.attention_norm, config)


def mlp_input(x_TM: Tensor, read_TM: Tensor, weights: Layer, config: LayerConfig) -> Tensor:
    """Return what the MLP reads beside attention, which reads `read_TM`."""
    return read_TM if weights.mlp_norm is None else _normed(x_TM, weights.mlp_norm, config)


def between_reductions(x_TM: Tensor, out_TM: Tensor, weights: Layer, config: LayerConfig) -> tuple[Tensor, Tensor]:
    """Return what the MLP's output is added to, and what the MLP reads; `out_TM` is attention's output."""
    x_TM = joined(x_TM, out_TM, weights.attention_output_norm, config)
    read_TM = _normed(x_TM, weights.mlp_norm, config)
    return read_TM if config.norm_placement is NormPlacement.STREAM_NORM else x_TM, read_TM


def after_reduce(x_TM: Tensor, out_TM: Tensor, weights: Layer, config: LayerConfig) -> Tensor:
    """Return the layer's output; `out_TM` is the MLP's, or that of both sub-layers."""
    return joined(x_TM, out_TM, weights.mlp_output_norm, config)


def joined(x_TM: Tensor, out_TM: Tensor, norm: Norm | None, config: LayerConfig) -> Tensor:
    """Return a sub-layer's output added to what it is added to, normed where the config says."""
    if config.norm_placement is NormPlacement.POST_NORM:
        return _normed(_sum(x_TM, out_TM, config), norm, config)
    return _sum(x_TM, _normed(out_TM, norm, config), config)


def _sum(x_TM: Tensor, out_TM: Tensor, config: LayerConfig) -> Tensor:
    return x_TM + out_TM if config.residual_scale == 1.0 else x_TM + config.residual_scale * out_TM


def _normed(x_TM: Tensor, weights: Norm | None, config: LayerConfig) -> Tensor:
    return x_TM if weights is None else norm(x_TM, weights.gain_M, weights.bias_M, config.norm)


def feed(normed_TM: Tensor, weights: Layer, config: LayerConfig, storage: Storage, product: Product) -> Tensor:
    """Return the output of the MLP, or of the experts in its place."""
    if isinstance(config.mlp, MoeConfig):
        assert isinstance(weights.mlp, Moe)
        return mixture(normed_TM, weights.mlp, config.mlp, storage, product)
    assert isinstance(weights.mlp, Mlp)
    return dense(normed_TM, weights.mlp, config.mlp, storage, product)


def project(normed_TM: Tensor, weights: Layer, config: AttentionConfig, storage: Storage, product: Product) -> Tensor:
    """Return query, key and value heads [T, H + 2 K, D], clipped."""
    qkv_TN = product(normed_TM, weights.qkv, storage)
    if config.qkv_clip is not None:
        qkv_TN = qkv_TN.clamp(-config.qkv_clip, config.qkv_clip)
    return qkv_TN.view(qkv_TN.shape[0], -1, config.head_size)


def mix(
    qkv_TGD: Tensor,
    weights: Layer,
    table: Table,
    attend: Attend,
    config: AttentionConfig,
    storage: Storage,
    product: Product,
) -> Tensor:
    """Return the output of attention for projected heads, which are normed and rotated here, in either order."""
    first_value = config.heads + config.kv_heads
    query_key_TGD, value_TKD = qkv_TGD[:, :first_value], qkv_TGD[:, first_value:]
    if not config.qk_norm_rotated:
        query_key_TGD = _query_key_normed(query_key_TGD, weights, config)
    if table is not None:
        assert config.rotary is not None
        query_key_TGD = rotate(query_key_TGD, *table, config.rotary.layout)
    if config.qk_norm_rotated:
        query_key_TGD = _query_key_normed(query_key_TGD, weights, config)
    mixed_THD = attend(query_key_TGD[:, : config.heads], query_key_TGD[:, config.heads :], value_TKD)
    return product(mixed_THD.flatten(1), weights.output, storage)


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
