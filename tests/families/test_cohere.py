"""Command R and R7B beside transformers, over everything that their config classes let vary."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Cohere2Config, Cohere2ForCausalLM, CohereConfig, CohereForCausalLM

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import LayerConfig, NormKind, Residual
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .llama_family import (
    comparable,
    few,
    layers_with,
    other_layout,
    reads_alike,
    rotating,
    seeds,
    sizes,
    window_longer,
    windowed,
)

OLDER_COHERE2: dict[str, Any] = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 5,
    "cache_implementation": "hybrid",
    "eos_token_id": 255001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 8192,
    "model_type": "cohere2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "use_qk_norm": False,
    "vocab_size": 256000,
}
"""Command R7B's config.json."""


def some(draw: st.DrawFn) -> dict[str, Any]:
    fields = draw(rotating(draw(sizes(eps="layer_norm_eps"))))
    return fields | {"attention_bias": draw(st.booleans()), "logit_scale": draw(st.sampled_from([0.0625, 1.0, 3.0]))}


@st.composite
def configs(draw: st.DrawFn) -> CohereConfig:
    fields = some(draw)
    size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return CohereConfig(**fields, use_qk_norm=size > 2 and draw(st.booleans()))  # of two elements a norm is ill-posed


@st.composite
def configs2(draw: st.DrawFn) -> Cohere2Config:
    fields = some(draw) | {"sliding_window_pattern": draw(st.integers(1, 4))}
    return Cohere2Config(
        **fields,
        sliding_window=draw(st.integers(1, 14)),
        layer_types=draw(windowed(fields["num_hidden_layers"])),
    )


@few
@given(config=configs(), seed=seeds)
def test_cohere(config: CohereConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(CohereForCausalLM, config, seed, **comparable(config))


@few
@given(config=configs2(), seed=seeds)
def test_cohere2(config: Cohere2Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Cohere2ForCausalLM, config, seed, **comparable(config))


def test_published_configs() -> None:
    older = {
        "architectures": ["CohereForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "hidden_act": "silu",
        "hidden_size": 12288,
        "initializer_range": 0.02,
        "intermediate_size": 33792,
        "layer_norm_eps": 1e-05,
        "logit_scale": 0.8333333333333334,
        "max_position_embeddings": 8192,
        "model_max_length": 131072,
        "model_type": "cohere",
        "num_attention_heads": 96,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rope_theta": 75000000.0,
        "torch_dtype": "float16",
        "transformers_version": "4.40.0.dev0",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 256000,
    }
    reads_alike(CohereConfig, older)
    reads_alike(Cohere2Config, OLDER_COHERE2)


@pytest.mark.parametrize(
    "field", [{"layer_switch": 2}, {"use_qk_norm": True}, {"rotary_pct": 0.5}, {"use_embedding_sharing": False}]
)
def test_what_is_not_computed_is_refused(field: dict[str, Any]) -> None:
    config = Fields(OLDER_COHERE2 | field, "config.json: ")
    with pytest.raises(ConfigError, match=next(iter(field))):
        parse_config(find(FAMILIES, config), config)


def test_the_pattern_goes_by_two_names() -> None:
    """Newer files keep it under a name with a dash before, beside the layers' types, which count."""
    types = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "layer_types": types}
    saved = json.loads(Cohere2Config(**sizes).to_json_string()) | {"_sliding_window_pattern": 4}
    saved.pop("sliding_window_pattern", None)
    config = Fields(saved, "config.json: ")
    parsed = parse_config(find(FAMILIES, config), config).config
    assert [layer.attention.window for layer in parsed.layers] == [4096, None, 4096, None]
    both = Fields(saved | {"sliding_window_pattern": 2}, "config.json: ")
    with pytest.raises(ConfigError, match="_sliding_window_pattern is 4; it must be as sliding_window_pattern is"):
        parse_config(find(FAMILIES, both), both)
    del saved["layer_types"]
    config = Fields(saved | {"_sliding_window_pattern": 2}, "config.json: ")
    parsed = parse_config(find(FAMILIES, config), config).config
    assert [layer.attention.window for layer in parsed.layers] == [4096, None, 4096, None]


def gains_of_first_head(weights: LayerWeights) -> LayerWeights:
    norm = weights.attention.query_norm
    assert norm is not None
    shared = replace(norm, gain_M=norm.gain_M[:6].repeat(4))
    return replace(weights, attention=replace(weights.attention, query_norm=shared))


def not_centered(layer: LayerConfig) -> LayerConfig:
    norm = replace(layer.norm, kind=NormKind.RMS)
    return replace(layer, norm=norm, attention=replace(layer.attention, qk_norm=norm))


WRONG: dict[str, dict[str, Any]] = {
    "rotary layout": layers_with(other_layout),
    "gains shared by heads": {"on_layer": gains_of_first_head},
    "norms not centered": layers_with(not_centered),
    "logits not scaled": {"on_config": lambda config: replace(config, logit_scale=1.0)},
}
TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 24,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    catches(CohereForCausalLM, CohereConfig(**TINY, num_hidden_layers=2, use_qk_norm=True), WRONG)


def unrotated(layer: LayerConfig) -> LayerConfig:
    return replace(layer, attention=replace(layer.attention, rotary=None))


def without_frequencies(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention=replace(weights.attention, rotary_frequency_J=None))


def test_wrong_mappings_of_cohere2_are_seen(catches: Callable[..., None]) -> None:
    wrong = {
        "window one longer": layers_with(window_longer),
        "rotary layout": layers_with(lambda layer: layer if layer.attention.rotary is None else other_layout(layer)),
        "no layer rotates": layers_with(unrotated) | {"on_layer": without_frequencies},
        "MLP after attention": layers_with(lambda layer: replace(layer, residual=Residual.SEQUENTIAL))
        | {"on_layer": lambda weights: replace(weights, mlp_norm=weights.attention_norm)},
    }
    config = Cohere2Config(**TINY | {"sliding_window_pattern": 2}, num_hidden_layers=2, sliding_window=4)
    catches(Cohere2ForCausalLM, config, wrong)
