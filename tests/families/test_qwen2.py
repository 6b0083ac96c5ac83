"""Qwen 2 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from twinfer.spec.weights import LayerWeights

from .examples import drawn
from .llama_family import (
    KINDS,
    comparable,
    layers_with,
    other_layout,
    reads_alike,
    rotating,
    seeds,
    sizes,
    window_longer,
    windowed,
)
from .published_config import published


@st.composite
def configs(draw: st.DrawFn, kind: str | None = None) -> Qwen2Config:
    fields = draw(rotating(draw(sizes()), kind))
    windows: dict[str, Any] = {}
    if draw(st.booleans()):
        windows = {
            "use_sliding_window": True,
            "sliding_window": draw(st.integers(1, 14)),
            "max_window_layers": draw(st.integers(0, 4)),
            "layer_types": draw(windowed(fields["num_hidden_layers"])),
        }
    return Qwen2Config(**fields, **windows)


@pytest.mark.parametrize("kind", KINDS)
@drawn(3)
@given(data=st.data(), seed=seeds)
def test_qwen2(kind: str, data: st.DataObject, seed: int, agrees: Callable[..., None]) -> None:
    config = data.draw(configs(kind))
    agrees(Qwen2ForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """Qwen2.5-7B's config.json, in the style of its day."""
    older = published("qwen2.5-7b")
    yarn = {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}}
    reads_alike(Qwen2Config, older)
    reads_alike(Qwen2Config, older | yarn)
    reads_alike(Qwen2Config, older | {"use_sliding_window": True, "max_window_layers": 21})


def bias_dropped(weights: LayerWeights) -> LayerWeights:
    value = weights.attention.value
    assert value.bias_N is not None
    return replace(weights, attention=replace(weights.attention, value=replace(value, bias_N=value.bias_N * 0)))


WRONG: dict[str, dict[str, Any]] = {
    "bias of the values dropped": {"on_layer": bias_dropped},
    "window one longer": layers_with(window_longer),
    "window of the first layers": {"on_config": lambda config: replace(config, layers=config.layers[::-1])},
    "rotary layout": layers_with(other_layout),
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Qwen2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    )
    catches(Qwen2ForCausalLM, config, WRONG)
