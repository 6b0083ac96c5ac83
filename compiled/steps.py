"""The programs: a decode step, a prefill and the encoding of texts, each a few compiled pieces.

A program is plain Python over three kinds of pieces: the prologue before the layers, a layer, and the epilogue after
them. Each piece is one graph without breaks, and a layer's is compiled once for all layers of equal config. `layers`
has what a layer's piece computes.

Why it is faster: norms, rotations, activations and additions are fused into the products' neighbors, and a piece is
one call. A whole model as one graph would call its layers one by one as well, and take many times as long to compile.
What it relies on: no piece reads a tensor's value or allocates by one, so the decode step can be captured (`graph`,
`cpu_graph`); caches are written in place and keep their addresses. Layers are taken one after the other from an
iterable, and nothing looks at them before a step: they may come from a disk. A model without embedding is given hidden
vectors `x`, and one without head returns them.

Shapes: R sequences that gain one token, T prompt tokens of one sequence or tokens of N texts, S key positions, M
hidden, W table width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec.config import LayerConfig, ModelConfig, Storage
from .attention import DecodeMask, decode_mask, mask
from .compute import DEFAULT, accumulation_dtype
from .embedding import Embedding, Product, embed
from .head import scale_and_cap
from .layers import Cache, Table, decode_layer, encode_layer, prefill_layer
from .linear import linear_decode, linear_prefill
from .norms import norm
from .programs import DynamicDims, P, R
from .rotary import rotary_table
from .weights import Head, Layer, Model, Rotation


class Piece(Protocol):
    """What makes a piece of a function: `programs.Pieces`, or `eager`."""

    def __call__(self, function: Callable[P, R], dynamic: DynamicDims) -> Callable[P, R]: ...


def eager(function: Callable[P, R], dynamic: DynamicDims) -> Callable[P, R]:
    """Return the function: a piece that is not compiled."""
    return function


class DecodePositions(NamedTuple):
    """What the layers of a decode step have in common."""

    tables: list[tuple[Tensor, Tensor]]
    """For each different rotation."""
    masks: list[DecodeMask]
    """For each different window."""
    position_R: Tensor
    write_R: Tensor
    """The slots that the new tokens' keys and values go to."""


class PrefillPositions(NamedTuple):
    """What the layers of a prefill have in common."""

    tables: list[tuple[Tensor, Tensor]]
    masks: list[Tensor]
    """For each different window, [T, S]."""
    write_T: Tensor
    read_S: Tensor


class Parts(NamedTuple):
    """A program before its loop over the layers, for loops of another kind (several calls share each layer)."""

    first: Callable[..., tuple[Tensor | None, Any]]
    """The piece that embeds tokens, and finds what all layers have in common."""
    layer: Callable[..., Tensor]
    """Takes the layer's config, x, weights, cache, the place of its rotation, and what all layers have in common."""
    last: Callable[..., Any]
    """The piece after the layers."""


class Prefilled(NamedTuple):
    hidden_TW: Tensor
    """For every token; normalized and ready for the projection where the model has a head."""
    logits_1V: Tensor | None
    """Those that follow the last token, where the model has a head."""


def decode_positions(
    rotations: Sequence[Rotation],
    windows: Sequence[int | None],
    step_3R: Tensor,
    slot_S: Tensor,
    compute: torch.dtype = DEFAULT,
) -> DecodePositions:
    """Return tables, masks and slots for a step: tokens (not looked at), their positions, their sequences' slots."""
    _, position_R, start_R = step_3R.unbind()
    tables = [rotary_table(position_R, *each, compute=compute) for each in rotations]
    masks = [decode_mask(start_R, position_R, slot_S, each, compute=compute) for each in windows]
    return DecodePositions(tables, masks, position_R.clone(), start_R + position_R)


def prefill_positions(
    rotations: Sequence[Rotation],
    windows: Sequence[int | None],
    position_T: Tensor,
    start_1: Tensor,
    slot_S: Tensor,
    compute: torch.dtype = DEFAULT,
) -> PrefillPositions:
    """Return tables, masks and slots for tokens of one sequence, whose first slot is `start_1`."""
    tables = [rotary_table(position_T, *each, compute=compute) for each in rotations]
    masks = [mask(position_T, slot_S, window, compute=compute) for window in windows]
    return PrefillPositions(tables, masks, start_1 + position_T, start_1 + slot_S)


def decode_program(
    config: ModelConfig, storage: Storage, piece: Piece, *, compute: torch.dtype = DEFAULT, many: bool = False
) -> Callable[..., Tensor]:
    """Return a function (model, caches, step_3R, slot_S, x_RM=None) -> logits [R, V].

    A step is three integers for each sequence: its new token, that token's position, and the sequence's first slot. R
    is always that of the first call; with `many` it varies, and the products are those for many rows.
    """
    parts = decode_parts(config, storage, piece, compute=compute, many=many)

    def decode(
        model: Model, caches: Sequence[Cache], step_3R: Tensor, slot_S: Tensor, x_RM: Tensor | None = None
    ) -> Tensor:
        embedded_RM, positions = parts.first(model.embedding, model.rotations.different, step_3R, slot_S)
        x_RM = _entering(embedded_RM, x_RM)
        for layer, weights, cache, place in zip(
            config.layers, model.layers, caches, model.rotations.of_layer, strict=True
        ):
            x_RM = parts.layer(layer, x_RM, weights, cache, place, positions, slot_S)
        return x_RM if model.head is None else parts.last(x_RM, model.head)

    return decode


def decode_parts(
    config: ModelConfig, storage: Storage, piece: Piece, *, compute: torch.dtype = DEFAULT, many: bool = False
) -> Parts:
    """Return the pieces of `decode_program`."""
    product = linear_prefill if many else linear_decode
    windows = different_windows(config)
    rows = (0,) if many else ()

    def prologue(
        embedding: Embedding | None, rotations: tuple[Rotation, ...], step_3R: Tensor, slot_S: Tensor
    ) -> tuple[Tensor | None, DecodePositions]:
        token_R, position_R, _ = step_3R.unbind()
        given = config, storage, product
        x_RM = None if embedding is None else embed(token_R, position_R, embedding, *given, compute=compute)
        return x_RM, decode_positions(rotations, windows, step_3R, slot_S, compute)

    def layer_of(layer: LayerConfig) -> Callable[..., Tensor]:
        def decode(
            x_RM: Tensor,
            weights: Layer,
            cache: Cache,
            table: Table,
            write_R: Tensor,
            position_R: Tensor,
            slot_S: Tensor,
            mask: DecodeMask,
        ) -> Tensor:
            given = x_RM, weights, cache, table, write_R, position_R, slot_S, mask
            return decode_layer(*given, config=layer, storage=storage, product=product)

        rows_of = dict.fromkeys(("x_RM", "table", "write_R", "position_R"), rows)
        return piece(decode, {**rows_of, "cache": (0,), "slot_S": (0,), "mask": (*rows, 1)})

    def epilogue(x_RM: Tensor, head: Head) -> Tensor:
        return logits_of(for_projection(x_RM, head, config, storage, product), head, config, storage, product)

    first = piece(prologue, {"step_3R": (1,) if many else (), "slot_S": (0,)})
    pieces = {layer: layer_of(layer) for layer in dict.fromkeys(config.layers)}
    last = piece(epilogue, {"x_RM": rows})

    def through(
        layer: LayerConfig,
        x_RM: Tensor,
        weights: Layer,
        cache: Cache,
        place: int | None,
        positions: DecodePositions,
        slot_S: Tensor,
    ) -> Tensor:
        table = None if place is None else positions.tables[place]
        mask = positions.masks[windows.index(layer.attention.window)]
        where = table, positions.write_R, positions.position_R, slot_S, mask
        return pieces[layer](x_RM, weights, cache, *where)

    return Parts(first, through, last)


def prefill_program(
    config: ModelConfig, storage: Storage, piece: Piece, *, compute: torch.dtype = DEFAULT
) -> Callable[..., Prefilled]:
    """Return a function (model, caches, token_T, position_T, start_1, slot_S, x_TM=None) -> `Prefilled`."""
    parts = prefill_parts(config, storage, piece, compute=compute)

    def prefill(
        model: Model,
        caches: Sequence[Cache],
        token_T: Tensor,
        position_T: Tensor,
        start_1: Tensor,
        slot_S: Tensor,
        x_TM: Tensor | None = None,
    ) -> Prefilled:
        given = token_T, position_T, start_1, slot_S
        embedded_TM, positions = parts.first(model.embedding, model.rotations.different, *given)
        x_TM = _entering(embedded_TM, x_TM)
        for layer, weights, cache, place in zip(
            config.layers, model.layers, caches, model.rotations.of_layer, strict=True
        ):
            x_TM = parts.layer(layer, x_TM, weights, cache, place, positions)
        return Prefilled(x_TM, None) if model.head is None else parts.last(x_TM, model.head)

    return prefill


def prefill_parts(config: ModelConfig, storage: Storage, piece: Piece, *, compute: torch.dtype = DEFAULT) -> Parts:
    """Return the pieces of `prefill_program`."""
    windows = different_windows(config)

    def prologue(
        embedding: Embedding | None,
        rotations: tuple[Rotation, ...],
        token_T: Tensor,
        position_T: Tensor,
        start_1: Tensor,
        slot_S: Tensor,
    ) -> tuple[Tensor | None, PrefillPositions]:
        given = config, storage, linear_prefill
        x_TM = None if embedding is None else embed(token_T, position_T, embedding, *given, compute=compute)
        return x_TM, prefill_positions(rotations, windows, position_T, start_1, slot_S, compute)

    def layer_of(layer: LayerConfig) -> Callable[..., Tensor]:
        def prefill(
            x_TM: Tensor,
            weights: Layer,
            cache: Cache,
            table: Table,
            write_T: Tensor,
            read_S: Tensor,
            mask_TS: Tensor,
        ) -> Tensor:
            given = x_TM, weights, cache, table, write_T, read_S, mask_TS
            return prefill_layer(*given, config=layer, storage=storage)

        tokens_of = dict.fromkeys(("x_TM", "table", "write_T"), (0,))
        return piece(prefill, {**tokens_of, "cache": (0,), "read_S": (0,), "mask_TS": (0, 1)})

    def epilogue(x_TM: Tensor, head: Head) -> Prefilled:
        hidden_TW = for_projection(x_TM, head, config, storage, linear_prefill)
        return Prefilled(hidden_TW, logits_of(hidden_TW[-1:], head, config, storage, linear_decode))

    first = piece(prologue, dict.fromkeys(("token_T", "position_T", "slot_S"), (0,)))
    pieces = {layer: layer_of(layer) for layer in dict.fromkeys(config.layers)}
    last = piece(epilogue, {"x_TM": (0,)})

    def through(
        layer: LayerConfig,
        x_TM: Tensor,
        weights: Layer,
        cache: Cache,
        place: int | None,
        positions: PrefillPositions,
    ) -> Tensor:
        table = None if place is None else positions.tables[place]
        mask_TS = positions.masks[windows.index(layer.attention.window)]
        return pieces[layer](x_TM, weights, cache, table, positions.write_T, positions.read_S, mask_TS)

    return Parts(first, through, last)


def encode_program(
    config: ModelConfig, storage: Storage, piece: Piece, *, compute: torch.dtype = DEFAULT
) -> Callable[..., Tensor]:
    """Return a function (model, token_T, type_T, position_T, cu_seqlens, x_TM=None) -> hidden vectors [T, W].

    They are normalized, and there is one for every token of texts that follow each other, which `cu_seqlens` parts as
    `attend_varlen` says; positions begin anew with each. `type_T` is None for a model without token types.
    """

    def prologue(
        embedding: Embedding | None,
        rotations: tuple[Rotation, ...],
        token_T: Tensor,
        type_T: Tensor | None,
        position_T: Tensor,
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        given = config, storage, linear_prefill, type_T
        x_TM = None if embedding is None else embed(token_T, position_T, embedding, *given, compute=compute)
        return x_TM, [rotary_table(position_T, *each, compute=compute) for each in rotations]

    def layer_of(layer: LayerConfig) -> Callable[..., Tensor]:
        def encode(x_TM: Tensor, weights: Layer, table: Table, cu_seqlens: Tensor) -> Tensor:
            return encode_layer(x_TM, weights, table, cu_seqlens, config=layer, storage=storage)

        return piece(encode, dict.fromkeys(("x_TM", "table", "cu_seqlens"), (0,)))

    def epilogue(x_TM: Tensor, head: Head) -> Tensor:
        return for_projection(x_TM, head, config, storage, linear_prefill)

    first = piece(prologue, dict.fromkeys(("token_T", "type_T", "position_T"), (0,)))
    pieces = {layer: layer_of(layer) for layer in dict.fromkeys(config.layers)}
    last = piece(epilogue, {"x_TM": (0,)})

    def encode(
        model: Model,
        token_T: Tensor,
        type_T: Tensor | None,
        position_T: Tensor,
        cu_seqlens: Tensor,
        x_TM: Tensor | None = None,
    ) -> Tensor:
        embedded_TM, tables = first(model.embedding, model.rotations.different, token_T, type_T, position_T)
        x_TM = _entering(embedded_TM, x_TM)
        for layer, weights, place in zip(config.layers, model.layers, model.rotations.of_layer, strict=True):
            x_TM = pieces[layer](x_TM, weights, None if place is None else tables[place], cu_seqlens)
        return x_TM if model.head is None else last(x_TM, model.head)

    return encode


def different_windows(config: ModelConfig) -> list[int | None]:
    """Return the different windows of the layers."""
    return list(dict.fromkeys(layer.attention.window for layer in config.layers))


def _entering(embedded: Tensor | None, given: Tensor | None) -> Tensor:
    """Return what enters the first layer: embedded tokens, or the hidden vectors that were given."""
    hidden = given if embedded is None else embedded
    assert hidden is not None, "a model without embedding is given hidden vectors"
    return hidden


def for_projection(x_TM: Tensor, head: Head, config: ModelConfig, storage: Storage, product: Product) -> Tensor:
    """Return what the head's projection multiplies, [T, W]."""
    if head.norm is not None and config.final_norm is not None:
        x_TM = norm(x_TM, head.norm.gain_M, head.norm.bias_M, config.final_norm)
    return x_TM if head.reduction is None else product(x_TM, head.reduction, storage)


def logits_of(hidden_RE: Tensor, head: Head, config: ModelConfig, storage: Storage, product: Product) -> Tensor:
    """Return logits in the accumulation dtype: in a narrow one neighboring tokens would tie."""
    wide_RE = hidden_RE.to(accumulation_dtype(hidden_RE.dtype))
    return scale_and_cap(product(wide_RE, head.projection, storage), config.logit_scale, config.logit_softcap)
