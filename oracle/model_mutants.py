"""Faults of whole models, made by handing a path another config or other weights than it claims to have.

Each is one small mistake in one layer, as a converter, a kernel or a cache makes it; the rest of the model is right.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig, ModelConfig, NormConfig
from ..spec.shard import Shard
from ..spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, LinearWeights, WeightSource


class Changed:
    """A weight source with another config, and layers or a head that are changed as they are read."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig | None = None,
        *,
        layer: Callable[[int, LayerWeights], LayerWeights] = lambda index, weights: weights,
        head: Callable[[HeadWeights], HeadWeights] = lambda weights: weights,
    ) -> None:
        self.config = config or source.config
        self._source, self._layer, self._head = source, layer, head

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        return self._source.embedding(shard)

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        return self._layer(index, self._source.layer(index, shard))

    def head(self, shard: Shard | None = None) -> HeadWeights:
        return self._head(self._source.head(shard))


def model_mutants(source: WeightSource, seed: int) -> Iterator[tuple[str, WeightSource]]:
    """Yield every fault that the model can have, by name; the seed says in which layer."""
    config = source.config
    index = random.Random(seed).randrange(len(config.layers))
    layer, weights = config.layers[index], source.layer(index)
    attention, of_attention = layer.attention, weights.attention

    def configured(**fields: Any) -> WeightSource:
        return Changed(source, _with_layer(config, index, replace(layer, **fields)))

    def attending(**fields: Any) -> WeightSource:
        return configured(attention=replace(attention, **fields))

    def weighed(**fields: Any) -> WeightSource:
        changed = replace(weights, attention=replace(of_attention, **fields))
        return Changed(source, layer=lambda at, read: changed if at == index else read)

    yield "attention scale 3 % off", attending(scale=1.03 * attention.scale)
    if attention.window is not None:
        yield "window one wider", attending(window=attention.window + 1)
    if layer.norm.epsilon < 1e-4:
        yield "norm epsilon 1e-3", configured(norm=replace(layer.norm, epsilon=1e-3))
    for name in ("query", "value", "output"):
        linear: LinearWeights = getattr(of_attention, name)
        if linear.bias_N is not None:
            yield f"{name} bias dropped", weighed(**{name: replace(linear, bias_N=torch.zeros_like(linear.bias_N))})
    frequency_J = of_attention.rotary_frequency_J
    if frequency_J is not None and len(frequency_J) > 1:
        yield "rotary table shifted by one", weighed(rotary_frequency_J=frequency_J.roll(1))
    if attention.kv_heads > 1:
        yield (
            "two KV heads swapped",
            weighed(key=_swapped(of_attention.key, attention), value=_swapped(of_attention.value, attention)),
        )
    other = (index + 1) % len(config.layers)
    if other != index and _like(layer, config.layers[other]):
        places = {index: other, other: index}
        yield "two layers swapped", Changed(source, layer=lambda at, read: source.layer(places.get(at, at)))
    if config.final_norm is not None:
        final_norm = config.final_norm
        yield "final gain of one element ignored", Changed(source, head=lambda head: _one_gain(head, final_norm))


def _with_layer(config: ModelConfig, index: int, layer: LayerConfig) -> ModelConfig:
    layers = list(config.layers)
    layers[index] = layer
    return replace(config, layers=tuple(layers))


def _like(one: LayerConfig, other: LayerConfig) -> bool:
    """Whether weights of one layer fit another: they may differ in window, cap and attention factor."""
    freed = replace(other.attention, window=one.attention.window, softcap=one.attention.softcap)
    return one == replace(other, attention=replace(freed, rotary=one.attention.rotary))


def _swapped(linear: LinearWeights, config: AttentionConfig) -> LinearWeights:
    """The rows of the first two heads exchanged."""

    def rows(value: Tensor) -> Tensor:
        size = config.head_size
        return torch.cat([value[size : 2 * size], value[:size], value[2 * size :]])

    return replace(
        linear, weight_NI=rows(linear.weight_NI), bias_N=None if linear.bias_N is None else rows(linear.bias_N)
    )


def _one_gain(head: HeadWeights, config: NormConfig) -> HeadWeights:
    assert head.norm is not None, "the config has a final norm"
    gain_M = head.norm.gain_M.clone()
    gain_M[0] = 0.0 if config.gain_from_one else 1.0
    return replace(head, norm=replace(head.norm, gain_M=gain_M))
