"""What the tests of families with experts share: ways to be wrong."""

from dataclasses import replace
from typing import Any

from twinfer.spec.config import LayerConfig, ModelConfig
from twinfer.spec.moe import MoeConfig
from twinfer.spec.weights import LayerWeights, MoeWeights

from .llama_family import layers_with


def router_with(**fields: Any) -> dict[str, Any]:
    """A wrong mapping: these fields of every router otherwise."""

    def change(layer: LayerConfig) -> LayerConfig:
        if not isinstance(layer.mlp, MoeConfig):
            return layer
        return replace(layer, mlp=replace(layer.mlp, router=replace(layer.mlp.router, **fields)))

    return layers_with(change)


def _windows_moved(config: ModelConfig) -> ModelConfig:
    """Each layer with the window of the next one, the last with the first one's."""
    layers = config.layers
    moved = (
        replace(layer, attention=replace(layer.attention, window=following.attention.window))
        for layer, following in zip(layers, (*layers[1:], layers[0]), strict=True)
    )
    return replace(config, layers=tuple(moved))


WINDOWS_MOVED: dict[str, Any] = {"on_config": _windows_moved}


def _swapped(weights: LayerWeights) -> LayerWeights:
    mlp = weights.mlp
    if not isinstance(mlp, MoeWeights):
        return weights
    experts = mlp.experts
    assert experts.gate is not None
    return replace(weights, mlp=replace(mlp, experts=replace(experts, gate=experts.up, up=experts.gate)))


GATE_AND_UP_SWAPPED: dict[str, Any] = {"on_layer": _swapped}


def _shared_swapped(weights: LayerWeights) -> LayerWeights:
    mlp = weights.mlp
    assert isinstance(mlp, MoeWeights)
    shared = mlp.shared
    assert shared is not None
    assert shared.gate is not None
    return replace(weights, mlp=replace(mlp, shared=replace(shared, gate=shared.up, up=shared.gate)))


def _choice_bias_zero(weights: LayerWeights) -> LayerWeights:
    mlp = weights.mlp
    if not isinstance(mlp, MoeWeights):
        return weights
    assert mlp.choice_bias_E is not None
    return replace(weights, mlp=replace(mlp, choice_bias_E=0 * mlp.choice_bias_E))


SHARED_SWAPPED: dict[str, Any] = {"on_layer": _shared_swapped}
CHOICE_BIAS_ZERO: dict[str, Any] = {"on_layer": _choice_bias_zero}


def _shared_gate_at_half(weights: LayerWeights) -> LayerWeights:
    mlp = weights.mlp
    assert isinstance(mlp, MoeWeights)
    assert mlp.shared_gate is not None
    half = replace(mlp.shared_gate, weight_NI=0 * mlp.shared_gate.weight_NI)
    return replace(weights, mlp=replace(mlp, shared_gate=half))


def _sinks_negated(weights: LayerWeights) -> LayerWeights:
    sink_H = weights.attention.sink_H
    assert sink_H is not None
    return replace(weights, attention=replace(weights.attention, sink_H=-sink_H))


SHARED_GATE_AT_HALF: dict[str, Any] = {"on_layer": _shared_gate_at_half}
SINKS_NEGATED: dict[str, Any] = {"on_layer": _sinks_negated}
