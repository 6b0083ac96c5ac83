"""GPT-J beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTJConfig, GPTJForCausalLM

from twinfer.checkpoint.families.gptj import GPTJ
from twinfer.checkpoint.family import parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import LayerConfig, ModelConfig, Residual, RotaryLayout
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import HeadWeights, LayerWeights

from .examples import drawn


@st.composite
def configs(draw: st.DrawFn) -> GPTJConfig:
    heads, size = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    return GPTJConfig(
        vocab_size=draw(st.integers(3, 40)),
        n_positions=draw(st.integers(16, 64)),
        n_embd=heads * size + (2 if heads == 1 else 0),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        rotary_dim=2 * draw(st.integers(1, size // 2)),
        n_inner=draw(st.one_of(st.none(), st.integers(1, 20))),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu", "silu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_gptj(config: GPTJConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GPTJForCausalLM, config, seed)


def half_split(model: ModelConfig) -> ModelConfig:
    def changed(layer: LayerConfig) -> LayerConfig:
        assert layer.attention.rotary is not None
        rotary = replace(layer.attention.rotary, layout=RotaryLayout.HALF_SPLIT)
        return replace(layer, attention=replace(layer.attention, rotary=rotary))

    return replace(model, layers=tuple(changed(layer) for layer in model.layers))


def sequential(model: ModelConfig) -> ModelConfig:
    return replace(model, layers=tuple(replace(layer, residual=Residual.SEQUENTIAL) for layer in model.layers))


def norm_repeated(weights: LayerWeights) -> LayerWeights:
    return replace(weights, mlp_norm=weights.attention_norm)


def bias_dropped(weights: HeadWeights) -> HeadWeights:
    assert weights.bias_V is not None
    return replace(weights, bias_V=weights.bias_V * 0)


def frequencies_of_the_whole_head(weights: LayerWeights) -> LayerWeights:
    frequency_J = weights.attention.rotary_frequency_J
    assert frequency_J is not None
    return replace(weights, attention=replace(weights.attention, rotary_frequency_J=frequency_J**0.5))


WRONG: dict[str, dict[str, Any]] = {
    "halves rotate": {"on_config": half_split},
    "one after the other": {"on_config": sequential, "on_layer": norm_repeated},
    "head's bias dropped": {"on_head": bias_dropped},
    "frequencies of the whole head": {"on_layer": frequencies_of_the_whole_head},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = GPTJConfig(vocab_size=20, n_positions=32, n_embd=24, n_layer=2, n_head=3, rotary_dim=4)
    catches(GPTJForCausalLM, config, WRONG)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rotary_dim", None, "an even number, at most the 8 elements of a head"),
        ("rotary_dim", 3, "an even number, at most the 8 elements of a head"),
        ("rotary_dim", 10, "an even number, at most the 8 elements of a head"),
        ("rotary_dim", 0, "from 1 to"),
        ("rotary", False, "must be true"),
        ("scale_attn_weights", False, "must be true"),
    ],
)
def test_what_is_not_computed_is_refused(field: str, value: object, message: str) -> None:
    plain = {"vocab_size": 9, "n_positions": 8, "n_embd": 24, "n_layer": 1, "n_head": 3, "rotary_dim": 4}
    parse_config(GPTJ, Fields(plain, ""))
    with pytest.raises(ConfigError, match=f"{field} is .*{message}"):
        parse_config(GPTJ, Fields(plain | {field: value}, ""))
