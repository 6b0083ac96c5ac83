"""DistilBERT beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import DistilBertConfig, DistilBertForMaskedLM, DistilBertModel, PreTrainedModel

from twinfer.spec.config import Activation, ModelConfig
from twinfer.spec.weights import LayerWeights

from .examples import drawn


@st.composite
def configs(draw: st.DrawFn) -> DistilBertConfig:
    heads = draw(st.integers(1, 4))
    return DistilBertConfig(
        vocab_size=draw(st.integers(3, 40)),
        max_position_embeddings=draw(st.integers(11, 40)),
        sinusoidal_pos_embds=draw(st.booleans()),
        n_layers=draw(st.integers(1, 3)),
        n_heads=heads,
        dim=heads * draw(st.integers(1 if heads > 2 else 3, 9)),
        hidden_dim=draw(st.integers(1, 20)),
        activation=draw(st.sampled_from(["gelu", "relu", "gelu_new"])),
    )


@drawn(6)
@given(config=configs(), kind=st.sampled_from([DistilBertModel, DistilBertForMaskedLM]), seed=st.integers(0, 2**31))
def test_distilbert(
    config: DistilBertConfig, kind: type[PreTrainedModel], seed: int, encodes: Callable[..., None]
) -> None:
    encodes(kind, config, seed)


def value_and_output_swapped(weights: LayerWeights) -> LayerWeights:
    attention = weights.attention
    return replace(weights, attention=replace(attention, value=attention.output, output=attention.value))


def bias_dropped(weights: LayerWeights) -> LayerWeights:
    up = weights.mlp.up
    assert up.bias_N is not None
    return replace(weights, mlp=replace(weights.mlp, up=replace(up, bias_N=up.bias_N * 0)))


def gelu_by_tanh(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, mlp=replace(layer.mlp, activation=Activation.GELU_TANH)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


WRONG: dict[str, dict[str, Any]] = {
    "value and output swapped": {"on_layer": value_and_output_swapped},
    "a bias dropped": {"on_layer": bias_dropped},
    "GELU by tanh": {"on_config": gelu_by_tanh},
}


def test_wrong_mappings_are_seen(catches_encoding: Callable[..., None]) -> None:
    config = DistilBertConfig(vocab_size=20, max_position_embeddings=16, n_layers=2, n_heads=3, dim=12, hidden_dim=7)
    catches_encoding(DistilBertModel, config, WRONG)
