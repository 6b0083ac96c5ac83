"""The programs that are compiled: a decode step, a prefill and the encoding of texts, each over the whole model.

Why it is faster: one graph call a step instead of hundreds of operator calls, norms, rotations, activations and
additions fused into the products' neighbours, and the layer compiled once, as a region, for all layers of equal config.
What it relies on: no step reads a tensor's value or allocates by one, so a CUDA graph can capture the decode step;
caches are written in place and keep their addresses.

Shapes: R sequences that gain one token, T prompt tokens of one sequence or tokens of N texts, S key positions, M
hidden, E table width, H heads, K key/value heads, D head size, J rotating pairs, V vocabulary, C slots of the cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, ModelConfig, NormPlacement, QkNormSpan, Residual, Storage
from .attention import attend_decode, attend_prefill, attend_texts, mask, write
from .embedding import Product, embed
from .head import scale_and_cap
from .linear import linear_few, linear_many
from .mlp import activation, gated
from .norms import Norm, norm
from .rotary import rotary_table, rotate
from .weights import Layer, Model


class Cache(NamedTuple):
    """One layer's keys and values; sequence b, position p is slot b * capacity + p."""

    key_CKD: Tensor
    value_CKD: Tensor


Table = tuple[Tensor, Tensor] | None
"""cos and sin, or None for a layer without rotary positions."""


Region = Callable[[Callable[..., Tensor], int], Callable[..., Tensor]]
"""`programs.region`, or `as_is`."""


def decode_program(config: ModelConfig, storage: Storage, region: Region) -> Callable[..., Tensor]:
    """A function (model, caches, token_R, position_R, start_R, slot_S) -> logits [R, V].

    `region` wraps each kind of layer's function: `programs.region`, or `as_is`.
    """
    layer_of = _regions(config, lambda layer: _decode_layer(layer, storage), region)

    def decode(
        model: Model, caches: tuple[Cache, ...], token_R: Tensor, position_R: Tensor, start_R: Tensor, slot_S: Tensor
    ) -> Tensor:
        x_RM = embed(token_R, position_R, model.embedding, config, storage, linear_few)
        tables = _tables(model, config, position_R)
        for layer, weights, cache, table in zip(config.layers, model.layers, caches, tables, strict=True):
            x_RM = layer_of[layer](x_RM, weights, cache, table, start_R, position_R, slot_S)
        return _logits(_for_head(x_RM, model, config, storage, linear_few), model, config, storage)

    return decode


def prefill_program(config: ModelConfig, storage: Storage, region: Region) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function (model, caches, token_T, position_T, start, slot_S) -> logits [1, V], hidden [T, E].

    The logits follow the last token; the hidden vectors, of every token, are normed and ready for the head.
    """
    layer_of = _regions(config, lambda layer: _prefill_layer(layer, storage), region)

    def prefill(
        model: Model,
        caches: tuple[Cache, ...],
        token_T: Tensor,
        position_T: Tensor,
        start_1: Tensor,
        slot_S: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x_TM = embed(token_T, position_T, model.embedding, config, storage, linear_many)
        tables = _tables(model, config, position_T)
        masks = {
            window: mask(position_T, slot_S, window) for window in {layer.attention.window for layer in config.layers}
        }
        write_T, read_S = start_1 + position_T, start_1 + slot_S
        for layer, weights, cache, table in zip(config.layers, model.layers, caches, tables, strict=True):
            mask_TS = masks[layer.attention.window]
            x_TM = layer_of[layer](x_TM, weights, cache, table, write_T, read_S, mask_TS)
        hidden_TE = _for_head(x_TM, model, config, storage, linear_many)
        return _logits(hidden_TE[-1:], model, config, storage), hidden_TE

    return prefill


def encode_program(config: ModelConfig, storage: Storage, region: Region) -> Callable[..., Tensor]:
    """A function (model, token_T, type_T, position_T, bound_N) -> hidden vectors [T, E], normed, of every token.

    The tokens are those of texts one after the other, which `bound_N` parts as `attend_texts` says; positions begin
    anew with each. `type_T` is None for a model without token types.
    """
    layer_of = _regions(config, lambda layer: _encode_layer(layer, storage), region)

    def encode(model: Model, token_T: Tensor, type_T: Tensor | None, position_T: Tensor, bound_N: Tensor) -> Tensor:
        x_TM = embed(token_T, position_T, model.embedding, config, storage, linear_many, type_T)
        tables = _tables(model, config, position_T)
        for layer, weights, table in zip(config.layers, model.layers, tables, strict=True):
            x_TM = layer_of[layer](x_TM, weights, table, bound_N)
        return _for_head(x_TM, model, config, storage, linear_many)

    return encode


def _regions(
    config: ModelConfig, make: Callable[[LayerConfig], Callable[..., Tensor]], region: Region
) -> dict[LayerConfig, Callable[..., Tensor]]:
    """One region for each different layer, in the order in which they first stand."""
    made: dict[LayerConfig, Callable[..., Tensor]] = {}
    for layer in config.layers:
        if layer not in made:
            made[layer] = region(make(layer), len(made))
    return made


def _decode_layer(config: LayerConfig, storage: Storage) -> Callable[..., Tensor]:
    def layer(
        x_RM: Tensor, weights: Layer, cache: Cache, table: Table, start_R: Tensor, position_R: Tensor, slot_S: Tensor
    ) -> Tensor:
        def attend(normed_RM: Tensor) -> Tensor:
            query, key, value = _heads(linear_few(normed_RM, weights.qkv, storage), weights, table, config)
            write(cache.key_CKD, start_R + position_R, key)
            write(cache.value_CKD, start_R + position_R, value)
            mixed_RHD = attend_decode(
                query,
                cache.key_CKD,
                cache.value_CKD,
                start_R=start_R,
                position_R=position_R,
                slot_S=slot_S,
                scale=config.attention.scale,
                window=config.attention.window,
                softcap=config.attention.softcap,
                slope_H=weights.slope_H,
            )
            return linear_few(mixed_RHD.flatten(1), weights.output, storage)

        return _around(x_RM, weights, config, attend, _feeding(weights, config, storage, linear_few))

    return layer


def _prefill_layer(config: LayerConfig, storage: Storage) -> Callable[..., Tensor]:
    def layer(
        x_TM: Tensor,
        weights: Layer,
        cache: Cache,
        table: Table,
        write_T: Tensor,
        read_S: Tensor,
        mask_TS: Tensor,
    ) -> Tensor:
        def attend(normed_TM: Tensor) -> Tensor:
            query, key, value = _heads(linear_many(normed_TM, weights.qkv, storage), weights, table, config)
            write(cache.key_CKD, write_T, key)
            write(cache.value_CKD, write_T, value)
            mixed_THD = attend_prefill(
                query,
                cache.key_CKD,
                cache.value_CKD,
                slot_S=read_S,
                mask_TS=mask_TS,
                scale=config.attention.scale,
                window=config.attention.window,
                softcap=config.attention.softcap,
                slope_H=weights.slope_H,
            )
            return linear_many(mixed_THD.flatten(1), weights.output, storage)

        return _around(x_TM, weights, config, attend, _feeding(weights, config, storage, linear_many))

    return layer


def _encode_layer(config: LayerConfig, storage: Storage) -> Callable[..., Tensor]:
    def layer(x_TM: Tensor, weights: Layer, table: Table, bound_N: Tensor) -> Tensor:
        def attend(normed_TM: Tensor) -> Tensor:
            mixed_THD = attend_texts(
                *_heads(linear_many(normed_TM, weights.qkv, storage), weights, table, config),
                bound_N=bound_N,
                causal=config.attention.causal,
                scale=config.attention.scale,
                window=config.attention.window,
                softcap=config.attention.softcap,
                slope_H=weights.slope_H,
            )
            return linear_many(mixed_THD.flatten(1), weights.output, storage)

        return _around(x_TM, weights, config, attend, _feeding(weights, config, storage, linear_many))

    return layer


Half = Callable[[Tensor], Tensor]
"""Attention or MLP: rows [T, M] to what is added to them."""


def _feeding(weights: Layer, config: LayerConfig, storage: Storage, product: Product) -> Half:
    """The MLP, by products for a few rows or for many."""

    def feed(normed_TM: Tensor) -> Tensor:
        return product(_activated(product(normed_TM, weights.up, storage), config), weights.down, storage)

    return feed


def _around(x_TM: Tensor, weights: Layer, config: LayerConfig, attend: Half, feed: Half) -> Tensor:
    """The norms and additions around a layer's halves; the config is a constant, so one of these forms is traced."""
    read_TM = _normed(x_TM, weights.attention_norm, config)
    if config.residual is not Residual.SEQUENTIAL:
        mlp_read_TM = read_TM if weights.mlp_norm is None else _normed(x_TM, weights.mlp_norm, config)
        return _sum(x_TM, attend(read_TM) + feed(mlp_read_TM), config)
    if config.norm_placement is NormPlacement.ON_SUM:
        x_TM = _normed(_sum(x_TM, attend(read_TM), config), weights.attention_output_norm, config)
        return _normed(_sum(x_TM, feed(x_TM), config), weights.mlp_output_norm, config)
    if config.norm_placement is NormPlacement.ON_STREAM:
        read_TM = _normed(_sum(read_TM, attend(read_TM), config), weights.mlp_norm, config)
        return _sum(read_TM, feed(read_TM), config)
    x_TM = _sum(x_TM, _normed(attend(read_TM), weights.attention_output_norm, config), config)
    read_TM = _normed(x_TM, weights.mlp_norm, config)
    return _sum(x_TM, _normed(feed(read_TM), weights.mlp_output_norm, config), config)


def _sum(x_TM: Tensor, out_TM: Tensor, config: LayerConfig) -> Tensor:
    return x_TM + out_TM if config.residual_scale == 1.0 else x_TM + config.residual_scale * out_TM


def _normed(x_TM: Tensor, weights: Norm | None, config: LayerConfig) -> Tensor:
    return x_TM if weights is None else norm(x_TM, weights.gain_M, weights.bias_M, config.norm)


def _for_head(x_TM: Tensor, model: Model, config: ModelConfig, storage: Storage, product: Product) -> Tensor:
    """What the head multiplies, [T, E]."""
    if model.final_norm is not None and config.final_norm is not None:
        x_TM = norm(x_TM, model.final_norm.gain_M, model.final_norm.bias_M, config.final_norm)
    return x_TM if model.reduction is None else product(x_TM, model.reduction, storage)


def _logits(hidden_RE: Tensor, model: Model, config: ModelConfig, storage: Storage) -> Tensor:
    return scale_and_cap(linear_few(hidden_RE, model.head, storage), config.logit_scale, config.logit_softcap)


def _tables(model: Model, config: ModelConfig, position_T: Tensor) -> list[Table]:
    """Each layer's rotary table; layers that hold the same frequencies, and stretch them equally, share one."""
    made: dict[tuple[int, float], Table] = {}
    tables: list[Table] = []
    for weights, layer in zip(model.layers, config.layers, strict=True):
        rotary = layer.attention.rotary
        if weights.frequency_J is None or rotary is None:
            tables.append(None)
            continue
        key = id(weights.frequency_J), rotary.magnitude
        if key not in made:
            made[key] = rotary_table(position_T, weights.frequency_J, rotary.magnitude)
        tables.append(made[key])
    return tables


def _heads(qkv_TN: Tensor, weights: Layer, table: Table, config: LayerConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, H, D], key and value [T, K, D] from the merged product: clipped, normed, rotated."""
    attention = config.attention
    if attention.qkv_clip is not None:
        qkv_TN = qkv_TN.clamp(-attention.qkv_clip, attention.qkv_clip)
    qkv_TGD = qkv_TN.view(qkv_TN.shape[0], -1, attention.head_size)
    first_value = attention.heads + attention.kv_heads
    query_key_TGD, value_TKD = qkv_TGD[:, :first_value], qkv_TGD[:, first_value:]
    if weights.query_norm is not None and weights.key_norm is not None:
        query_THD = _head_normed(query_key_TGD[:, : attention.heads], weights.query_norm, attention)
        key_TKD = _head_normed(query_key_TGD[:, attention.heads :], weights.key_norm, attention)
        query_key_TGD = torch.cat((query_THD, key_TKD), 1)
    if table is not None:
        assert attention.rotary is not None
        query_key_TGD = rotate(query_key_TGD, *table, attention.rotary.layout)
    return query_key_TGD[:, : attention.heads], query_key_TGD[:, attention.heads :], value_TKD


def _head_normed(x_THD: Tensor, weights: Norm, config: AttentionConfig) -> Tensor:
    """Over each head, or over all of them as one row."""
    assert config.qk_norm is not None
    each = x_THD if config.qk_norm_span is QkNormSpan.HEAD else x_THD.flatten(1)
    return norm(each, weights.gain_M, weights.bias_M, config.qk_norm).view(x_THD.shape)


def _activated(up_TF: Tensor, config: LayerConfig) -> Tensor:
    kind = config.mlp.activation
    return gated(up_TF, kind) if config.mlp.gated else activation(up_TF, kind)
