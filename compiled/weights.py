"""Weights as the graphs take them, prepared one layer at a time from a `WeightSource`.

Why it is faster: Q, K and V are one product and gate and up another, so a layer is four products instead of seven,
each long enough to keep all cores reading. A float32 copy of more than one part never exists.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import ModelConfig, Storage
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
from .linear import Matrix
from .machine import return_freed_memory
from .packing import as_graph_input, pack


class Norm(NamedTuple):
    gain_M: Tensor
    bias_M: Tensor | None


class Layer(NamedTuple):
    """One layer; matrices are [outputs, inputs]."""

    attention_norm: Norm
    qkv: Matrix
    """[(H + 2 K) * D, M]: query heads, then key heads, then value heads."""
    output: Matrix
    mlp_norm: Norm
    up: Matrix
    """[2 F, M] where gated, gate first; else [F, M]."""
    down: Matrix
    frequency_J: Tensor | None
    """float64; layers of equal frequencies hold the same tensor."""


class Model(NamedTuple):
    table: Matrix
    position_PM: Tensor | None
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Matrix
    """The very tensors of `table` where the head is tied."""


def prepare(source: WeightSource, storage: Storage, device: torch.device) -> Model:
    """Read every part once, check it, round and pack it. Raises `ConfigError` for what the graphs do not compute."""
    config = source.config
    _check_computed(config)
    embedding = source.embedding()
    validate_embedding(embedding, config)
    table = _matrix([LinearWeights(weight_NI=embedding.token_VE)], storage, device)
    position_PM = None if embedding.position_PM is None else _plain(embedding.position_PM, device)
    del embedding
    head = source.head()
    validate_head(head, config)
    final_norm = _norm(head.norm, device)
    head_matrix = table if head.projection is None else _matrix([head.projection], storage, device)
    del head
    layers: list[Layer] = []
    for index in range(len(config.layers)):
        weights = source.layer(index)
        validate_layer(weights, config, index)
        layers.append(_layer(weights, storage, device, layers))
        del weights
        return_freed_memory()
    return Model(table, position_PM, tuple(layers), final_norm, head_matrix)


def _layer(weights: LayerWeights, storage: Storage, device: torch.device, before: list[Layer]) -> Layer:
    attention, mlp = weights.attention, weights.mlp
    frequency_J = attention.rotary_frequency_J
    if frequency_J is not None:
        same = (layer.frequency_J for layer in before if layer.frequency_J is not None)
        here_J = frequency_J.detach().to(device, torch.float64, copy=True)
        frequency_J = next((other_J for other_J in same if torch.equal(other_J, here_J)), here_J)
    return Layer(
        attention_norm=_norm(weights.attention_norm, device),
        qkv=_matrix([attention.query, attention.key, attention.value], storage, device),
        output=_matrix([attention.output], storage, device),
        mlp_norm=_norm(weights.mlp_norm, device),
        up=_matrix([mlp.up] if mlp.gate is None else [mlp.gate, mlp.up], storage, device),
        down=_matrix([mlp.down], storage, device),
        frequency_J=frequency_J,
    )


def _matrix(parts: list[LinearWeights], storage: Storage, device: torch.device) -> Matrix:
    """The parts below one another, packed. Rows are quantised alone, so merging changes no code."""
    weight_NI = parts[0].weight_NI if len(parts) == 1 else torch.cat([part.weight_NI for part in parts])
    biases = [part.bias_N for part in parts if part.bias_N is not None]
    packed = pack(weight_NI.detach(), storage, torch.cat(biases).detach() if biases else None)
    on_device = packed.to(device)
    return Matrix(as_graph_input(on_device), on_device.scale_N, on_device.bias_N)


def _norm(weights: NormWeights, device: torch.device) -> Norm:
    bias_M = None if weights.bias_M is None else _plain(weights.bias_M, device)
    return Norm(_plain(weights.gain_M, device), bias_M)


def _plain(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, torch.float32, copy=True).contiguous()


def _check_computed(config: ModelConfig) -> None:
    for index, layer in enumerate(config.layers):
        if layer.mlp.experts != 1:
            raise ConfigError(
                f"layer {index} has {layer.mlp.experts} experts; the compiled path computes dense MLPs (experts = 1)"
            )
