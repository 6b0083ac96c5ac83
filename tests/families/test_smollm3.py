"""SmolLM 3 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import LayerConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .llama_family import comparable, few, layers_with, reads_alike, rotating, seeds, sizes, window_longer, windowed
from .published_config import published

OLDER = published("smollm3-3b")
"""SmolLM3-3B's config.json."""


@st.composite
def configs(draw: st.DrawFn) -> SmolLM3Config:
    fields = draw(rotating(draw(sizes())))
    layers = fields["num_hidden_layers"]
    windows: dict[str, Any] = {}
    if draw(st.booleans()):
        windows = {
            "use_sliding_window": True,
            "sliding_window": draw(st.integers(1, 14)),
            "layer_types": draw(windowed(layers)),
        }
    return SmolLM3Config(
        **fields,
        **windows,
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        no_rope_layer_interval=draw(st.integers(1, 4)),
        no_rope_layers=draw(st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=layers, max_size=layers + 1))),
    )


@few
@given(config=configs(), seed=seeds)
def test_smollm3(config: SmolLM3Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(SmolLM3ForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """And without the lists, with windows, which then are of the layers that do not rotate."""
    reads_alike(SmolLM3Config, OLDER)
    bare = {name: value for name, value in OLDER.items() if name not in ("layer_types", "no_rope_layers")}
    reads_alike(SmolLM3Config, bare | {"use_sliding_window": True, "sliding_window": 512})


@pytest.mark.parametrize(
    "field", [{"no_rope_layers": [1, 0]}, {"no_rope_layers": [2] * 36}, {"layer_types": ["sliding_attention"] * 36}]
)
def test_what_does_not_fit_is_refused(field: dict[str, Any]) -> None:
    config = Fields(OLDER | field, "config.json: ")
    with pytest.raises(ConfigError, match=next(iter(field))):
        parse_config(find(FAMILIES, config), config)


def still(layer: LayerConfig) -> LayerConfig:
    return replace(layer, attention=replace(layer.attention, rotary=None))


def without_frequencies(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention=replace(weights.attention, rotary_frequency_J=None))


WRONG: dict[str, dict[str, Any]] = {
    "no layer rotates": layers_with(still) | {"on_layer": without_frequencies},
    "window one longer": layers_with(window_longer),
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = SmolLM3Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=4,
        pad_token_id=None,
    )
    catches(SmolLM3ForCausalLM, config, WRONG)
