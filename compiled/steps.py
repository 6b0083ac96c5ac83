"""The programs: a decode step, a prefill and the encoding of texts, each a few compiled pieces.

A program is plain Python over three kinds of pieces: what stands before the layers, a layer, and what stands after
them. Each piece is one graph without breaks, and a layer's is compiled once for all layers of equal config.

Why it is faster: norms, rotations, activations and additions are fused into the products' neighbors, and a piece is
one call. A whole model as one graph would call its layers one by one as well, and take many times as long to compile.
What it relies on: no piece reads a tensor's value or allocates by one, so the decode step can be captured (`graph`,
`tape`); caches are written in place and keep their addresses.

Shapes: R sequences that gain one token, T prompt tokens of one sequence or tokens of N texts, S key positions, M
hidden, E table width, H heads, K key/value heads, D head size, J rotating pairs, V vocabulary, C slots of the cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, ModelConfig, NormPlacement, QkNormSpan, Residual, Storage
from .attention import Seen, attend_decode, attend_prefill, attend_varlen, mask, seen, write
from .embedding import Embedding, Product, embed
from .head import scale_and_cap
from .linear import linear_decode, linear_prefill
from .mlp import activation, gated
from .norms import Norm, norm
from .packing import Matrix
from .precision import DEFAULT_COMPUTE, accumulation_dtype
from .rotary import rotary_table, rotate
from .weights import Layer, Model


class Cache(NamedTuple):
    """One layer's keys and values; sequence b, position p is slot b * capacity + p."""

    key_CKD: Tensor
    value_CKD: Tensor


Table = tuple[Tensor, Tensor] | None
"""cos and sin, or None for a layer without rotary positions."""


class Varying(NamedTuple):
    """Which dimensions of a piece's arguments change from call to call.

    Arguments by number; of a tuple, all its tensors.
    """

    first: tuple[int, ...] = ()
    second: tuple[int, ...] = ()


Piece = Callable[[Callable[..., Any], Varying], Callable[..., Any]]
"""What makes a piece of a function: `programs.Pieces`, or `as_is`."""


def as_is(function: Callable[..., Any], varying: Varying) -> Callable[..., Any]:
    """A piece that is not compiled."""
    return function


class Last(NamedTuple):
    """What stands after the layers."""

    norm: Norm | None
    reduction: Matrix | None
    head: Matrix


def decode_program(config: ModelConfig, storage: Storage, piece: Piece, *, many: bool = False) -> Callable[..., Tensor]:
    """A function (model, caches, step_3R, slot_S) -> logits [R, V].

    A step is three integers for each sequence: its new token, that token's position, and the sequence's first slot. R
    is always that of the first call; with `many` it varies, and the products are those for many rows.
    """
    product = linear_prefill if many else linear_decode
    windows = _windows(config)

    def before(embedding: Embedding, rotations: Rotations, step_3R: Tensor, slot_S: Tensor) -> Any:
        token_R, position_R, start_R = step_3R.unbind()
        x_RM = embed(token_R, position_R, embedding, config, storage, product, compute=DEFAULT_COMPUTE)
        tables = [rotary_table(position_R, *each, compute=x_RM.dtype) for each in rotations]
        seen_of = [seen(start_R, position_R, slot_S, each, compute=x_RM.dtype) for each in windows]
        return x_RM, tables, seen_of, position_R.clone(), start_R + position_R

    def after(x_RM: Tensor, last: Last) -> Tensor:
        return _logits(_for_head(x_RM, last, config, storage, product), last, config, storage, product)

    first = piece(before, Varying((3,), (2,) if many else ()))
    make = functools.partial(_decode_layer, storage=storage, product=product)
    layer_of = _layers(config, make, piece, Varying((0, 3, 4, 5, 7) if many else (), (7,)))
    final = piece(after, Varying((0,) if many else ()))

    def decode(model: Model, caches: tuple[Cache, ...], step_3R: Tensor, slot_S: Tensor) -> Tensor:
        rotations, which = _rotations(model, config)
        x_RM, tables, seen_of, position_R, write_R = first(model.embedding, rotations, step_3R, slot_S)
        for layer, weights, cache, table in zip(config.layers, model.layers, caches, which, strict=True):
            where = write_R, position_R, slot_S, seen_of[windows.index(layer.attention.window)]
            x_RM = layer_of[layer](x_RM, weights, cache, _table(tables, table), *where)
        logits_RV: Tensor = final(x_RM, _last(model))
        return logits_RV

    return decode


def prefill_program(config: ModelConfig, storage: Storage, piece: Piece) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function (model, caches, token_T, position_T, start, slot_S) -> logits [1, V], hidden [T, E].

    The logits follow the last token; the hidden vectors, of every token, are normed and ready for the head.
    """
    windows = _windows(config)

    def before(
        embedding: Embedding, rotations: Rotations, token_T: Tensor, position_T: Tensor, start_1: Tensor, slot_S: Tensor
    ) -> Any:
        x_TM = embed(token_T, position_T, embedding, config, storage, linear_prefill, compute=DEFAULT_COMPUTE)
        tables = [rotary_table(position_T, *each, compute=x_TM.dtype) for each in rotations]
        masks = [mask(position_T, slot_S, window, compute=x_TM.dtype) for window in windows]
        return x_TM, tables, masks, start_1 + position_T, start_1 + slot_S

    def after(x_TM: Tensor, last: Last) -> tuple[Tensor, Tensor]:
        hidden_TE = _for_head(x_TM, last, config, storage, linear_prefill)
        return _logits(hidden_TE[-1:], last, config, storage, linear_decode), hidden_TE

    first = piece(before, Varying())
    layer_of = _layers(config, lambda layer: _prefill_layer(layer, storage), piece, Varying((0, 3, 4, 5, 6), (6,)))
    final = piece(after, Varying((0,)))

    def prefill(
        model: Model, caches: tuple[Cache, ...], token_T: Tensor, position_T: Tensor, start_1: Tensor, slot_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        rotations, which = _rotations(model, config)
        x_TM, tables, masks, write_T, read_S = first(model.embedding, rotations, token_T, position_T, start_1, slot_S)
        for layer, weights, cache, table in zip(config.layers, model.layers, caches, which, strict=True):
            mask_TS = masks[windows.index(layer.attention.window)]
            x_TM = layer_of[layer](x_TM, weights, cache, _table(tables, table), write_T, read_S, mask_TS)
        logits_1V, hidden_TE = final(x_TM, _last(model))
        return logits_1V, hidden_TE

    return prefill


def encode_program(config: ModelConfig, storage: Storage, piece: Piece) -> Callable[..., Tensor]:
    """A function (model, token_T, type_T, position_T, cu_seqlens) -> hidden vectors [T, E], normed, of every token.

    The tokens are those of texts one after the other, which `cu_seqlens` parts as `attend_varlen` says; positions begin
    anew with each. `type_T` is None for a model without token types.
    """

    def before(
        embedding: Embedding, rotations: Rotations, token_T: Tensor, type_T: Tensor | None, position_T: Tensor
    ) -> Any:
        x_TM = embed(token_T, position_T, embedding, config, storage, linear_prefill, type_T, compute=DEFAULT_COMPUTE)
        return x_TM, [rotary_table(position_T, *each, compute=x_TM.dtype) for each in rotations]

    def after(x_TM: Tensor, last: Last) -> Tensor:
        return _for_head(x_TM, last, config, storage, linear_prefill)

    first = piece(before, Varying())
    layer_of = _layers(config, lambda layer: _encode_layer(layer, storage), piece, Varying((0, 2)))
    final = piece(after, Varying((0,)))

    def encode(model: Model, token_T: Tensor, type_T: Tensor | None, position_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        rotations, which = _rotations(model, config)
        x_TM, tables = first(model.embedding, rotations, token_T, type_T, position_T)
        for layer, weights, table in zip(config.layers, model.layers, which, strict=True):
            x_TM = layer_of[layer](x_TM, weights, _table(tables, table), cu_seqlens)
        hidden_TE: Tensor = final(x_TM, _last(model))
        return hidden_TE

    return encode


def _layers(
    config: ModelConfig, make: Callable[[LayerConfig], Callable[..., Tensor]], piece: Piece, varying: Varying
) -> dict[LayerConfig, Callable[..., Any]]:
    """One piece for each different layer."""
    return {layer: piece(make(layer), varying) for layer in dict.fromkeys(config.layers)}


def _windows(config: ModelConfig) -> list[int | None]:
    """The different ones."""
    return list(dict.fromkeys(layer.attention.window for layer in config.layers))


def _last(model: Model) -> Last:
    return Last(model.final_norm, model.reduction, model.head)


Rotations = tuple[tuple[Tensor, float], ...]
"""Frequencies, and by how much cos and sin are stretched."""


def _rotations(model: Model, config: ModelConfig) -> tuple[Rotations, list[int | None]]:
    """The different rotations, and which of them each layer has: equal frequencies are one tensor (`weights`)."""
    found: dict[tuple[int, float], tuple[Tensor, float]] = {}
    which: list[int | None] = []
    for weights, layer in zip(model.layers, config.layers, strict=True):
        rotary = layer.attention.rotary
        if weights.frequency_J is None or rotary is None:
            which.append(None)
            continue
        key = id(weights.frequency_J), rotary.attention_factor
        found.setdefault(key, (weights.frequency_J, rotary.attention_factor))
        which.append(list(found).index(key))
    return tuple(found.values()), which


def _table(tables: list[tuple[Tensor, Tensor]], which: int | None) -> Table:
    return None if which is None else tables[which]


def _decode_layer(config: LayerConfig, storage: Storage, product: Product) -> Callable[..., Tensor]:
    def layer(
        x_RM: Tensor,
        weights: Layer,
        cache: Cache,
        table: Table,
        write_R: Tensor,
        position_R: Tensor,
        slot_S: Tensor,
        seen: Seen,
    ) -> Tensor:
        def attend(normed_RM: Tensor) -> Tensor:
            query, key, value = _heads(product(normed_RM, weights.qkv, storage), weights, table, config)
            write(cache.key_CKD, write_R, key)
            write(cache.value_CKD, write_R, value)
            mixed_RHD = attend_decode(
                query,
                cache.key_CKD,
                cache.value_CKD,
                seen=seen,
                position_R=position_R,
                slot_S=slot_S,
                scale=config.attention.scale,
                softcap=config.attention.softcap,
                slope_H=weights.slope_H,
            )
            return product(mixed_RHD.flatten(1), weights.output, storage)

        return _around(x_RM, weights, config, attend, _feeding(weights, config, storage, product))

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
            query, key, value = _heads(linear_prefill(normed_TM, weights.qkv, storage), weights, table, config)
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
            return linear_prefill(mixed_THD.flatten(1), weights.output, storage)

        return _around(x_TM, weights, config, attend, _feeding(weights, config, storage, linear_prefill))

    return layer


def _encode_layer(config: LayerConfig, storage: Storage) -> Callable[..., Tensor]:
    def layer(x_TM: Tensor, weights: Layer, table: Table, cu_seqlens: Tensor) -> Tensor:
        def attend(normed_TM: Tensor) -> Tensor:
            mixed_THD = attend_varlen(
                *_heads(linear_prefill(normed_TM, weights.qkv, storage), weights, table, config),
                cu_seqlens=cu_seqlens,
                causal=config.attention.causal,
                scale=config.attention.scale,
                window=config.attention.window,
                softcap=config.attention.softcap,
                slope_H=weights.slope_H,
            )
            return linear_prefill(mixed_THD.flatten(1), weights.output, storage)

        return _around(x_TM, weights, config, attend, _feeding(weights, config, storage, linear_prefill))

    return layer


Half = Callable[[Tensor], Tensor]
"""Attention or MLP: rows [T, M] to what is added to them."""


def _feeding(weights: Layer, config: LayerConfig, storage: Storage, product: Product) -> Half:
    """The MLP, by products for a few rows or for many."""

    def feed(normed_TM: Tensor) -> Tensor:
        up = product(normed_TM, weights.up, storage)
        inner_TF = gated(up, config.mlp.activation) if config.mlp.gated else activation(up, config.mlp.activation)
        return product(inner_TF, weights.down, storage)

    return feed


def _around(x_TM: Tensor, weights: Layer, config: LayerConfig, attend: Half, feed: Half) -> Tensor:
    """The norms and additions around a layer's halves; the config is a constant, so one of these forms is traced."""
    read_TM = _normed(x_TM, weights.attention_norm, config)
    if config.residual is not Residual.SEQUENTIAL:
        mlp_read_TM = read_TM if weights.mlp_norm is None else _normed(x_TM, weights.mlp_norm, config)
        return _sum(x_TM, attend(read_TM) + feed(mlp_read_TM), config)
    if config.norm_placement is NormPlacement.POST_NORM:
        x_TM = _normed(_sum(x_TM, attend(read_TM), config), weights.attention_output_norm, config)
        return _normed(_sum(x_TM, feed(x_TM), config), weights.mlp_output_norm, config)
    if config.norm_placement is NormPlacement.STREAM_NORM:
        read_TM = _normed(_sum(read_TM, attend(read_TM), config), weights.mlp_norm, config)
        return _sum(read_TM, feed(read_TM), config)
    x_TM = _sum(x_TM, _normed(attend(read_TM), weights.attention_output_norm, config), config)
    read_TM = _normed(x_TM, weights.mlp_norm, config)
    return _sum(x_TM, _normed(feed(read_TM), weights.mlp_output_norm, config), config)


def _sum(x_TM: Tensor, out_TM: Tensor, config: LayerConfig) -> Tensor:
    return x_TM + out_TM if config.residual_scale == 1.0 else x_TM + config.residual_scale * out_TM


def _normed(x_TM: Tensor, weights: Norm | None, config: LayerConfig) -> Tensor:
    return x_TM if weights is None else norm(x_TM, weights.gain_M, weights.bias_M, config.norm)


def _for_head(x_TM: Tensor, last: Last, config: ModelConfig, storage: Storage, product: Product) -> Tensor:
    """What the head multiplies, [T, E]."""
    if last.norm is not None and config.final_norm is not None:
        x_TM = norm(x_TM, last.norm.gain_M, last.norm.bias_M, config.final_norm)
    return x_TM if last.reduction is None else product(x_TM, last.reduction, storage)


def _logits(hidden_RE: Tensor, last: Last, config: ModelConfig, storage: Storage, product: Product) -> Tensor:
    hidden_RE = hidden_RE.to(accumulation_dtype(hidden_RE.dtype))
    return scale_and_cap(product(hidden_RE, last.head, storage), config.logit_scale, config.logit_softcap)


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
