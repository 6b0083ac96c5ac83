"""GPT-Neo beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from twinfer.checkpoint.families.gpt_neo import GPT_NEO
from twinfer.checkpoint.family import parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import AttentionConfig, ModelConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import EmbeddingWeights

from .examples import drawn


@st.composite
def configs(draw: st.DrawFn) -> GPTNeoConfig:
    heads = draw(st.integers(1, 4))
    kinds = st.lists(st.sampled_from(["global", "local"]), min_size=1, max_size=2)
    types = draw(st.lists(st.tuples(kinds, st.integers(1, 2)), min_size=1, max_size=2))
    return GPTNeoConfig(
        vocab_size=draw(st.integers(3, 40)),
        max_position_embeddings=draw(st.integers(16, 64)),
        hidden_size=heads * draw(st.integers(1, 9)) + (2 * heads if heads <= 2 else 0),
        num_layers=sum(len(names) * times for names, times in types),
        attention_types=[[names, times] for names, times in types],
        num_heads=heads,
        intermediate_size=draw(st.one_of(st.none(), st.integers(1, 20))),
        window_size=draw(st.integers(1, 14)),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_gpt_neo(config: GPTNeoConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GPTNeoForCausalLM, config, seed)


def attention(**changes: Callable[[AttentionConfig], Any]) -> Callable[[ModelConfig], ModelConfig]:
    """Changes every layer's attention."""

    def changed(config: AttentionConfig) -> AttentionConfig:
        return replace(config, **{name: change(config) for name, change in changes.items()})

    return lambda model: replace(
        model, layers=tuple(replace(layer, attention=changed(layer.attention)) for layer in model.layers)
    )


def positions_late(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.position_PM is not None
    return replace(weights, position_PM=weights.position_PM.roll(-1, 0))


WRONG: dict[str, dict[str, Any]] = {
    "scores scaled": {"on_config": attention(scale=lambda config: config.head_size**-0.5)},
    "window one longer": {"on_config": attention(window=lambda config: config.window and config.window + 1)},
    "window in every layer": {"on_config": attention(window=lambda config: 4)},
    "positions one late": {"on_embedding": positions_late},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = GPTNeoConfig(
        vocab_size=20,
        max_position_embeddings=32,
        hidden_size=12,
        num_layers=2,
        num_heads=3,
        window_size=4,
        attention_types=[[["global", "local"], 1]],
    )
    catches(GPTNeoForCausalLM, config, WRONG)


PLAIN = {
    "model_type": "gpt_neo",
    "vocab_size": 9,
    "max_position_embeddings": 8,
    "hidden_size": 8,
    "num_layers": 3,
    "num_heads": 2,
    "window_size": 5,
}


@pytest.mark.parametrize(
    "layers",
    [
        {"attention_layers": ["local", "global", "local"]},
        {"attention_types": [[["local", "global"], 1], [["local"], 1]]},
        {
            "attention_types": [[["local", "global"], 1], [["local"], 1]],
            "attention_layers": ["local", "global", "local"],
        },
    ],
)
def test_windows_are_read_from_either_field(layers: dict[str, Any]) -> None:
    config = parse_config(GPT_NEO, Fields(PLAIN | layers, "")).config
    assert [layer.attention.window for layer in config.layers] == [5, None, 5]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"attention_layers": ["local", "global"]}, "attention_layers is .* for each of the 3 layers"),
        ({"attention_layers": ["local", "global", "wide"]}, "attention_layers is .* global or local"),
        ({"attention_types": [[["global"], 2]]}, "attention_types is .* for each of the 3 layers"),
        ({"attention_types": [["global", 3]]}, "attention_types is .* names, each group with how often"),
        ({"attention_types": [[["global"], 10**9]]}, "attention_types is .* names, each group with how often"),
        ({"attention_types": "global"}, "attention_types is .* names, each group with how often"),
        ({}, "attention_types is missing; .* names, each group"),
        ({"attention_types": [[["global"], 3]], "attention_layers": ["local"] * 3}, "disagree"),
    ],
)
def test_layers_that_are_not_told_plainly_are_refused(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(GPT_NEO, Fields(PLAIN | layers, ""))
