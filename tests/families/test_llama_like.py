"""LLaMA and Mistral beside transformers, over everything that their config classes let vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from twinfer.spec.weights import LayerWeights

from .examples import drawn
from .llama_family import KINDS, comparable, few, layers_with, reads_alike, rotating, seeds, sizes, window_longer
from .published_config import published


@st.composite
def llamas(draw: st.DrawFn, kind: str | None = None) -> LlamaConfig:
    fields = draw(rotating(draw(sizes(divided=True)), kind))
    return LlamaConfig(**fields, attention_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()))


@st.composite
def mistrals(draw: st.DrawFn) -> MistralConfig:
    window = draw(st.one_of(st.none(), st.integers(1, 14)))
    return MistralConfig(**draw(rotating(draw(sizes()))), sliding_window=window)


@pytest.mark.parametrize("kind", KINDS)
@drawn(3)
@given(data=st.data(), seed=seeds)
def test_llama(kind: str, data: st.DataObject, seed: int, agrees: Callable[..., None]) -> None:
    config = data.draw(llamas(kind))
    agrees(LlamaForCausalLM, config, seed, **comparable(config))


@few
@given(config=mistrals(), seed=seeds)
def test_mistral(config: MistralConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(MistralForCausalLM, config, seed, **comparable(config))


def test_published_configs() -> None:
    """LLaMA 3.1 8B's and Mistral 7B's config.json; and scalings as they were first spelled."""
    llama = published("llama-3.1-8b")
    reads_alike(LlamaConfig, llama)
    for kind in ("linear", "dynamic", "yarn"):
        reads_alike(LlamaConfig, llama | {"rope_scaling": {"type": kind, "factor": 2.0}})
    mistral = published("mistral-7b")
    reads_alike(MistralConfig, mistral)
    reads_alike(MistralConfig, mistral | {"sliding_window": None})


def interleaved(weights: LayerWeights) -> LayerWeights:
    """Query rows as GGUF keeps them."""

    def permuted(weight_NI: Tensor) -> Tensor:
        return weight_NI.view(4, 2, 4, -1).transpose(1, 2).reshape(weight_NI.shape)

    query = weights.attention.query
    return replace(
        weights, attention=replace(weights.attention, query=replace(query, weight_NI=permuted(query.weight_NI)))
    )


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)


def unscaled(weights: LayerWeights) -> LayerWeights:
    """Frequencies as they were before they were divided by 4."""
    frequency_J = weights.attention.rotary_frequency_J
    assert frequency_J is not None
    return replace(weights, attention=replace(weights.attention, rotary_frequency_J=4 * frequency_J))


TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "unpermuted rotary": {"on_layer": interleaved},
        "norms swapped": {"on_layer": norms_swapped},
        "rotary not scaled": {"on_layer": unscaled},
    }
    config = LlamaConfig(**TINY, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    catches(LlamaForCausalLM, config, wrong)


def test_wrong_windows_are_seen(catches: Callable[..., None]) -> None:
    config = MistralConfig(**TINY, num_key_value_heads=2, sliding_window=4)
    wrong = {
        "window one longer": layers_with(window_longer),
        "no window": layers_with(lambda layer: replace(layer, attention=replace(layer.attention, window=None))),
        "norms swapped": {"on_layer": norms_swapped},
    }
    catches(MistralForCausalLM, config, wrong)
