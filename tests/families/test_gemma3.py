"""Gemma 3's language model beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import LayerConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .llama_family import comparable, few, layers_with, reads_alike, scalings, seeds, sizes, window_longer, windowed
from .published_config import published

OLDER: dict[str, Any] = published("gemma-3-1b-it")
"""Gemma 3 1B's config.json as it was first published."""


@st.composite
def configs(draw: st.DrawFn) -> Gemma3TextConfig:
    fields = draw(sizes(divided=True, activation="hidden_activation"))
    size = fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    scaling = scalings(size, fields["max_position_embeddings"], truncate=False)
    fields["sliding_window_pattern"] = draw(st.integers(1, 4))
    types = {"full_attention": draw(scaling), "sliding_attention": draw(scaling)}
    return Gemma3TextConfig(
        **fields,
        attention_bias=draw(st.booleans()),
        query_pre_attn_scalar=draw(st.integers(1, 20)),
        sliding_window=draw(st.integers(1, 14)),
        layer_types=draw(windowed(fields["num_hidden_layers"])),
        final_logit_softcapping=draw(st.sampled_from([None, 0.5])),
        rope_parameters=draw(st.sampled_from([types, None])),
    )


@few
@given(config=configs(), seed=seeds)
def test_gemma3(config: Gemma3TextConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Gemma3ForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """Layers without a window may be scaled, those with one are not; every sixth is without, or as a pattern says."""
    reads_alike(Gemma3TextConfig, OLDER)
    reads_alike(Gemma3TextConfig, OLDER | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}})
    reads_alike(Gemma3TextConfig, OLDER | {"sliding_window_pattern": 2, "rope_local_base_freq": 777.0})
    newer = {name: value for name, value in OLDER.items() if name != "sliding_window_pattern"}
    reads_alike(Gemma3TextConfig, newer | {"rope_parameters": {"full_attention": {"rope_type": "default"}}})


@pytest.mark.parametrize("field", [{"attn_logit_softcapping": 50.0}, {"use_bidirectional_attention": True}])
def test_what_is_not_computed_is_refused(field: dict[str, Any]) -> None:
    config = Fields(OLDER | field, "config.json: ")
    with pytest.raises(ConfigError, match=next(iter(field))):
        parse_config(find(FAMILIES, config), config)


def frequencies_of_others(weights: LayerWeights) -> LayerWeights:
    """The other type's: base 10 000 and 1 000 000 exchanged."""
    frequency_J = weights.attention.rotary_frequency_J
    assert frequency_J is not None
    other_J = frequency_J ** (4 / 6 if frequency_J[1] < 0.02 else 6 / 4)
    return replace(weights, attention=replace(weights.attention, rotary_frequency_J=other_J))


def plain_gains(layer: LayerConfig) -> LayerConfig:
    norm = layer.attention.qk_norm
    assert norm is not None
    return replace(layer, attention=replace(layer.attention, qk_norm=replace(norm, gain_from_one=False)))


WRONG: dict[str, dict[str, Any]] = {
    "rotary bases exchanged": {"on_layer": frequencies_of_others},
    "gains of queries and keys from zero": layers_with(plain_gains),
    "window one longer": layers_with(window_longer),
    "windows in the other layers": {"on_config": lambda config: replace(config, layers=config.layers[::-1])},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Gemma3TextConfig(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    catches(Gemma3ForCausalLM, config, WRONG)
