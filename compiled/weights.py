"""Weights as the graphs take them, prepared one layer at a time from a `WeightSource`.

Why it is faster: Q, K and V are one product, and so are gate and up: fewer loops, at whose ends threads wait for each
other. A float32 copy of more than one part never exists.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, ModelConfig, NormConfig, QkNormSpan, Storage
from ..spec.errors import WeightError
from ..spec.weights import (
    EmbeddingWeights,
    ExpertWeights,
    HeadWeights,
    LayerWeights,
    LinearWeights,
    MlpWeights,
    MoeWeights,
    NormWeights,
    WeightSource,
    validate_embedding,
    validate_head,
    validate_layer,
)
from .compute import DEFAULT, accumulation_dtype
from .embedding import Embedding
from .experts import stack
from .machine import return_freed_memory
from .moe import Mlp, Moe
from .norms import Norm
from .packing import AbsmaxOfRows, Matrix, own, pack, quantize


class Layer(NamedTuple):
    """One layer; matrices are [outputs, inputs]."""

    attention_norm: Norm | None
    """For both inputs where attention and MLP share one."""
    qkv: Matrix
    """[(H + 2 K) * D, M]: query heads, then key heads, then value heads."""
    output: Matrix
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp | Moe
    mlp_output_norm: Norm | None
    slope_H: Tensor | None
    """ALiBi's, float64."""
    query_norm: Norm | None
    """[H, D] where each head is normalized by itself, else [H * D]."""
    key_norm: Norm | None
    sink_H: Tensor | None


class Rotation(NamedTuple):
    """What makes a rotary table of positions."""

    frequency_J: Tensor
    """float64."""
    attention_factor: float
    """Multiplies cos and sin."""


class Rotations(NamedTuple):
    """The rotations of a model, which are small and stay when layers come and go."""

    different: tuple[Rotation, ...]
    of_layer: tuple[int | None, ...]
    """For each layer the place in `different`, or None without rotary positions."""


class Head(NamedTuple):
    """What stands after the layers."""

    norm: Norm | None
    reduction: Matrix | None
    """[W, M], where the table is not as wide as the hidden vector."""
    projection: Matrix
    """The very words of the token table where the head is tied; also where there is none, and then nothing reads it."""


class Model(NamedTuple):
    """A prepared model, or consecutive layers of one: these lack what they do not hold."""

    embedding: Embedding | None
    layers: Iterable[Layer]
    """In order, and anew each time that it is iterated over."""
    rotations: Rotations
    head: Head | None
    storage: Storage
    device: torch.device
    compute: torch.dtype


def prepare(source: WeightSource, storage: Storage, device: torch.device, compute: torch.dtype = DEFAULT) -> Model:
    """Read every part once, check it, round and pack it."""
    config = source.config
    embedding = prepare_embedding(_checked_embedding(source), config, storage, device, compute)
    head = prepare_head(_checked_head(source), config, storage, device, compute, tied=embedding.table)
    layers: list[Layer] = []
    frequencies: list[Tensor | None] = []
    for index, layer in enumerate(config.layers):
        weights = source.layer(index)
        validate_layer(weights, config, index)
        layers.append(prepare_layer(weights, layer, storage, device, compute))
        frequencies.append(weights.attention.rotary_frequency_J)
        del weights
        return_freed_memory()
    rotations = find_rotations(frequencies, config, device)
    return Model(embedding, tuple(layers), rotations, head, storage, device, compute)


def prepare_embedding(
    weights: EmbeddingWeights,
    config: ModelConfig,
    storage: Storage,
    device: torch.device,
    compute: torch.dtype = DEFAULT,
) -> Embedding:
    """Return what makes hidden vectors of tokens. The weights fit the config (`validate_embedding`)."""
    return Embedding(
        table=_matrix([LinearWeights(weight_NI=weights.token_VW)], storage, device),
        projection=None if weights.projection is None else _matrix([weights.projection], storage, device),
        position_PM=None if weights.position_PM is None else _plain(weights.position_PM, device, compute),
        type_YM=None if weights.type_YM is None else _plain(weights.type_YM, device, compute),
        norm=prepared_norm(weights.norm, config.embedding_norm, device, compute),
    )


def prepare_layer(
    weights: LayerWeights,
    config: LayerConfig,
    storage: Storage,
    device: torch.device,
    compute: torch.dtype = DEFAULT,
    *,
    of_rows: AbsmaxOfRows | None = None,
    of_expert_rows: AbsmaxOfRows | None = None,
) -> Layer:
    """Return one layer; no other is needed. The weights fit the config (`validate_layer`).

    `of_rows` is given for a rank's share of a layer: it completes the absmax of matrices that are cut by columns;
    `of_expert_rows` does so for those of experts, which other ranks have the rest of.
    """

    def norm(part: NormWeights | None) -> Norm | None:
        return prepared_norm(part, config.norm, device, compute)

    attention, mlp = weights.attention, weights.mlp
    slope_H = attention.alibi_slope_H
    return Layer(
        attention_norm=norm(weights.attention_norm),
        qkv=_matrix([attention.query, attention.key, attention.value], storage, device),
        output=_matrix([attention.output], storage, device, of_rows),
        attention_output_norm=norm(weights.attention_output_norm),
        mlp_norm=norm(weights.mlp_norm),
        mlp=_mlp(mlp, storage, device, of_rows)
        if isinstance(mlp, MlpWeights)
        else prepared_moe(mlp, storage, device, compute, of_rows, of_expert_rows),
        mlp_output_norm=norm(weights.mlp_output_norm),
        slope_H=None if slope_H is None else slope_H.detach().to(device, torch.float64, copy=True),
        query_norm=_head_norm(attention.query_norm, config.attention, device, compute),
        key_norm=_head_norm(attention.key_norm, config.attention, device, compute),
        sink_H=None if attention.sink_H is None else _plain(attention.sink_H, device, compute),
    )


def _mlp(weights: MlpWeights, storage: Storage, device: torch.device, of_rows: AbsmaxOfRows | None) -> Mlp:
    up = [weights.up] if weights.gate is None else [weights.gate, weights.up]
    return Mlp(_matrix(up, storage, device), _matrix([weights.down], storage, device, of_rows))


def prepared_moe(
    weights: MoeWeights,
    storage: Storage,
    device: torch.device,
    compute: torch.dtype,
    of_rows: AbsmaxOfRows | None = None,
    of_expert_rows: AbsmaxOfRows | None = None,
) -> Moe:
    """Return a mixture as the graphs take it: what maps a token to a few numbers is float32 in every storage."""

    def few(part: LinearWeights | None) -> Matrix | None:
        return None if part is None else _matrix([part], Storage.FLOAT32, device)

    return Moe(
        router=_matrix([weights.router], Storage.FLOAT32, device),
        choice_bias_E=None if weights.choice_bias_E is None else _plain(weights.choice_bias_E, device, compute),
        experts=prepare_experts(weights.experts, storage, device, of_expert_rows),
        shared=None if weights.shared is None else _mlp(weights.shared, storage, device, of_rows),
        shared_gate=few(weights.shared_gate),
        residual=None if weights.residual is None else _mlp(weights.residual, storage, device, of_rows),
        coefficient=few(weights.coefficient),
    )


def prepare_experts(
    weights: ExpertWeights, storage: Storage, device: torch.device, of_rows: AbsmaxOfRows | None = None
) -> Mlp:
    """Return experts, all of a layer or some; of each, rows are quantized alone."""
    up = [weights.up] if weights.gate is None else [weights.gate, weights.up]
    return Mlp(stack(up, storage).to(device), stack([weights.down], storage, of_rows).to(device))


def prepare_head(
    weights: HeadWeights,
    config: ModelConfig,
    storage: Storage,
    device: torch.device,
    compute: torch.dtype = DEFAULT,
    *,
    tied: Matrix | None = None,
) -> Head:
    """Return what stands after the layers. `tied` is the token table, for weights without a head of their own.

    The weights fit the config (`validate_head`).
    """
    if weights.projection is not None:
        projection = _matrix([weights.projection], storage, device)
    elif tied is not None:
        projection = tied
    else:
        raise WeightError("the head is tied to the token table, which is not given; prepare it first and pass it")
    return Head(
        norm=prepared_norm(weights.norm, config.final_norm, device, compute),
        reduction=None if weights.reduction is None else _matrix([weights.reduction], storage, device),
        projection=projection._replace(
            bias_N=None if weights.bias_V is None else _plain(weights.bias_V, device, compute)
        ),
    )


def find_rotations(frequencies: Sequence[Tensor | None], config: ModelConfig, device: torch.device) -> Rotations:
    """Return the different rotations of layers with these frequencies, which are compared by value.

    A layer without frequencies, or whose config has no rotary positions, has none.
    """
    different: list[Rotation] = []
    of_layer: list[int | None] = []
    for frequency_J, layer in zip(frequencies, config.layers, strict=True):
        rotary = layer.attention.rotary
        if frequency_J is None or rotary is None:
            of_layer.append(None)
            continue
        own_J = frequency_J.detach().to(device, torch.float64, copy=True)
        equal = (place for place, each in enumerate(different) if _is_rotation(each, own_J, rotary.attention_factor))
        place = next(equal, len(different))
        if place == len(different):
            different.append(Rotation(own_J, rotary.attention_factor))
        of_layer.append(place)
    return Rotations(tuple(different), tuple(of_layer))


def _is_rotation(rotation: Rotation, frequency_J: Tensor, attention_factor: float) -> bool:
    return rotation.attention_factor == attention_factor and torch.equal(rotation.frequency_J, frequency_J)


def _checked_embedding(source: WeightSource) -> EmbeddingWeights:
    weights = source.embedding()
    validate_embedding(weights, source.config)
    return weights


def _checked_head(source: WeightSource) -> HeadWeights:
    weights = source.head()
    validate_head(weights, source.config)
    return weights


def _matrix(
    parts: list[LinearWeights], storage: Storage, device: torch.device, of_rows: AbsmaxOfRows | None = None
) -> Matrix:
    """The parts below one another, packed. Rows are quantized alone, so merging changes no code."""
    weight_NI = parts[0].weight_NI if len(parts) == 1 else torch.cat([part.weight_NI for part in parts])
    biases = [part.bias_N for part in parts if part.bias_N is not None]
    quantized = quantize(weight_NI.detach(), storage, of_rows)
    return pack(quantized, torch.cat(biases).detach() if biases else None).to(device)


def prepared_norm(
    weights: NormWeights | None, config: NormConfig | None, device: torch.device, compute: torch.dtype = DEFAULT
) -> Norm | None:
    """Return vectors in the accumulation dtype; a gain stored as its distance from 1 is made whole once."""
    if weights is None or config is None:
        return None
    gain_M = 1 + weights.gain_M.to(torch.float64) if config.gain_from_one else weights.gain_M
    bias_M = None if weights.bias_M is None else _plain(weights.bias_M, device, compute)
    return Norm(_plain(gain_M, device, compute), bias_M)


def _head_norm(
    weights: NormWeights | None, config: AttentionConfig, device: torch.device, compute: torch.dtype
) -> Norm | None:
    flat = prepared_norm(weights, config.qk_norm, device, compute)
    if flat is None or config.qk_norm_span is QkNormSpan.ALL_HEADS:
        return flat
    bias_M = None if flat.bias_M is None else own(flat.bias_M.view(-1, config.head_size))
    return Norm(own(flat.gain_M.view(-1, config.head_size)), bias_M)


def _plain(tensor: Tensor, device: torch.device, compute: torch.dtype) -> Tensor:
    return tensor.detach().to(device, accumulation_dtype(compute), copy=True).contiguous()
