"""Weights as the graphs take them, prepared one layer at a time from a `WeightSource`.

Why it is faster: Q, K and V are one product, and so are gate and up: fewer loops, at whose ends threads wait for each
other. A float32 copy of more than one part never exists.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, ModelConfig, NormConfig, QkNormSpan, Storage
from ..spec.errors import ConfigError
from ..spec.weights import (
    LayerWeights,
    LinearWeights,
    NormWeights,
    WeightSource,
    validate_embedding,
    validate_head,
    validate_layer,
)
from .embedding import Embedding
from .machine import return_freed_memory
from .norms import Norm
from .packing import Matrix, own, pack, quantize
from .precision import DEFAULT_COMPUTE, accumulation_dtype


class Layer(NamedTuple):
    """One layer; matrices are [outputs, inputs]."""

    attention_norm: Norm | None
    """Of both inputs where attention and MLP share one."""
    qkv: Matrix
    """[(H + 2 K) * D, M]: query heads, then key heads, then value heads."""
    output: Matrix
    attention_output_norm: Norm | None
    mlp_norm: Norm | None
    up: Matrix
    """[F, M]; where gated [2 F, M], the gate's rows first."""
    down: Matrix
    mlp_output_norm: Norm | None
    frequency_J: Tensor | None
    """float64; layers of equal frequencies hold the same tensor."""
    slope_H: Tensor | None
    """ALiBi's, float64."""
    query_norm: Norm | None
    """[H, D] where each head is normalized by itself, else [H * D]."""
    key_norm: Norm | None


class Model(NamedTuple):
    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    reduction: Matrix | None
    """[E, M], where the table is not as wide as the hidden vector."""
    head: Matrix
    """The very words of the token table where the head is tied; also where there is none, and then nothing reads it."""


def prepare(source: WeightSource, storage: Storage, device: torch.device) -> Model:
    """Read every part once, check it, round and pack it. Raises `ConfigError` for what the graphs do not compute."""
    config = source.config
    _check_computed(config)
    embedding = _embedding(source, storage, device)
    final_norm, reduction, head = _head(source, embedding.table, storage, device)
    layers: list[Layer] = []
    for index in range(len(config.layers)):
        weights = source.layer(index)
        validate_layer(weights, config, index)
        layers.append(_layer(weights, config.layers[index], storage, device, layers))
        del weights
        return_freed_memory()
    return Model(embedding, tuple(layers), final_norm, reduction, head)


def _embedding(source: WeightSource, storage: Storage, device: torch.device) -> Embedding:
    weights, config = source.embedding(), source.config
    validate_embedding(weights, config)
    return Embedding(
        table=_matrix([LinearWeights(weight_NI=weights.token_VE)], storage, device),
        projection=None if weights.projection is None else _matrix([weights.projection], storage, device),
        position_PM=None if weights.position_PM is None else _plain(weights.position_PM, device),
        type_YM=None if weights.type_YM is None else _plain(weights.type_YM, device),
        norm=prepared_norm(weights.norm, config.embedding_norm, device),
    )


def _head(
    source: WeightSource, table: Matrix, storage: Storage, device: torch.device
) -> tuple[Norm | None, Matrix | None, Matrix]:
    """Final norm, reduction and head."""
    weights, config = source.head(), source.config
    validate_head(weights, config)
    head = table if weights.projection is None else _matrix([weights.projection], storage, device)
    return (
        prepared_norm(weights.norm, config.final_norm, device),
        None if weights.reduction is None else _matrix([weights.reduction], storage, device),
        head._replace(bias_N=None if weights.bias_V is None else _plain(weights.bias_V, device)),
    )


def _layer(
    weights: LayerWeights, config: LayerConfig, storage: Storage, device: torch.device, before: list[Layer]
) -> Layer:
    def norm(part: NormWeights | None) -> Norm | None:
        return prepared_norm(part, config.norm, device)

    attention, mlp = weights.attention, weights.mlp
    frequency_J, slope_H = attention.rotary_frequency_J, attention.alibi_slope_H
    if frequency_J is not None:
        same = (layer.frequency_J for layer in before if layer.frequency_J is not None)
        here_J = frequency_J.detach().to(device, torch.float64, copy=True)
        frequency_J = next((other_J for other_J in same if torch.equal(other_J, here_J)), here_J)
    return Layer(
        attention_norm=norm(weights.attention_norm),
        qkv=_matrix([attention.query, attention.key, attention.value], storage, device),
        output=_matrix([attention.output], storage, device),
        attention_output_norm=norm(weights.attention_output_norm),
        mlp_norm=norm(weights.mlp_norm),
        up=_matrix([mlp.up] if mlp.gate is None else [mlp.gate, mlp.up], storage, device),
        down=_matrix([mlp.down], storage, device),
        mlp_output_norm=norm(weights.mlp_output_norm),
        frequency_J=frequency_J,
        slope_H=None if slope_H is None else slope_H.detach().to(device, torch.float64, copy=True),
        query_norm=_head_norm(attention.query_norm, config.attention, device),
        key_norm=_head_norm(attention.key_norm, config.attention, device),
    )


def _matrix(parts: list[LinearWeights], storage: Storage, device: torch.device) -> Matrix:
    """The parts below one another, packed. Rows are quantized alone, so merging changes no code."""
    weight_NI = parts[0].weight_NI if len(parts) == 1 else torch.cat([part.weight_NI for part in parts])
    biases = [part.bias_N for part in parts if part.bias_N is not None]
    quantized = quantize(weight_NI.detach(), storage)
    return pack(quantized, torch.cat(biases).detach() if biases else None).to(device)


def prepared_norm(
    weights: NormWeights | None,
    config: NormConfig | None,
    device: torch.device,
    compute: torch.dtype = DEFAULT_COMPUTE,
) -> Norm | None:
    """Return float32 vectors; a gain stored as its distance from 1 is made whole here, so no graph does it.

    For float64 compute that sum is float64: float32 would round it.
    """
    if weights is None or config is None:
        return None
    bias_M = None if weights.bias_M is None else _plain(weights.bias_M, device)
    gain_M = _plain(weights.gain_M, device)
    if config.gain_from_one:
        gain_M = (1 + gain_M.to(torch.float64)).to(accumulation_dtype(compute))
    return Norm(gain_M, bias_M)


def _head_norm(weights: NormWeights | None, config: AttentionConfig, device: torch.device) -> Norm | None:
    flat = prepared_norm(weights, config.qk_norm, device)
    if flat is None or config.qk_norm_span is QkNormSpan.ALL_HEADS:
        return flat
    bias_M = None if flat.bias_M is None else own(flat.bias_M.view(-1, config.head_size))
    return Norm(own(flat.gain_M.view(-1, config.head_size)), bias_M)


def _plain(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()


def _check_computed(config: ModelConfig) -> None:
    for index, layer in enumerate(config.layers):
        if layer.mlp.experts != 1:
            raise ConfigError(
                f"layer {index} has {layer.mlp.experts} experts; the compiled path computes dense MLPs (experts = 1)"
            )
