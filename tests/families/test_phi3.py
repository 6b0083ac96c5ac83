"""Phi 3 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Phi3Config, Phi3ForCausalLM

from twinfer.checkpoint import open_model
from twinfer.checkpoint.families.phi3 import PHI3
from twinfer.checkpoint.family import parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.checkpoint.rotary_fields import Rotation
from twinfer.spec.config import LayerConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .llama_family import (
    ACTIVATIONS,
    SHORTEST,
    comparable,
    few,
    layers_with,
    other_layout,
    reads_alike,
    seeds,
    window_longer,
)
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> Phi3Config:
    kv_heads, group, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(3, 9))
    context, turning = draw(st.integers(16, 64)), draw(st.integers(1, size // 2 * 2))
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": draw(st.sampled_from([10000.0, 77.0]))}
    original = draw(st.sampled_from([SHORTEST, context, 2 * context, 4096]))
    if draw(st.booleans()):
        turning += turning % 2  # the class wants a divisor for each pair, and of an odd size counts the last out
        divisors = st.lists(st.sampled_from([1.0, 1.1, 3.0]), min_size=turning // 2, max_size=turning // 2)
        rotary |= {"rope_type": "longrope", "short_factor": draw(divisors), "long_factor": draw(divisors)}
        rotary |= draw(st.sampled_from([{}, {"attention_factor": 0.7}, {"factor": 8.0}]))
    return Phi3Config(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=kv_heads * group * size,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=draw(st.sampled_from([kv_heads, None])),
        hidden_act=draw(st.sampled_from(ACTIVATIONS)),
        max_position_embeddings=context,
        original_max_position_embeddings=original,
        rms_norm_eps=draw(st.sampled_from([1e-5, 0.25])),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=rotary | {"partial_rotary_factor": min(1.0, (turning + 0.5) / size)},
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 14))),
        pad_token_id=None,
    )


@few
@given(config=configs(), seed=seeds)
def test_phi3(config: Phi3Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Phi3ForCausalLM, config, seed, **comparable(config))


PUBLISHED: dict[str, Any] = published("phi-3-mini-4k")
LONG: dict[str, Any] = {"short_factor": [1.0 + each / 100 for each in range(48)], "long_factor": [4.0] * 48}
MINI_4: dict[str, Any] = {
    "auto_map": PUBLISHED["auto_map"] | {"AutoTokenizer": "Xenova/gpt-4o"},
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "rope_scaling": LONG | {"type": "longrope"},
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": LONG | {"type": "longrope"}},
        MINI_4,
    ],
)
def test_published_configs_read_as_transformers_reads_them(changes: dict[str, Any]) -> None:
    """Phi-3-mini-4k's, -128k's, and Phi-4-mini's."""
    reads_alike(Phi3Config, PUBLISHED | changes)


def test_longrope_was_called_su() -> None:
    """As Phi-3-mini-128k's first config.json has it, which transformers no longer reads."""

    def rotation(name: str) -> Rotation:
        changes = {"max_position_embeddings": 131072, "rope_scaling": LONG | {"type": name}}
        found = parse_config(PHI3, Fields(PUBLISHED | changes, "")).rotations[0]
        assert found is not None
        return found

    older, newer = rotation("su"), rotation("longrope")
    assert older.config == newer.config
    assert torch.equal(older.frequency_J, newer.frequency_J)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": LONG | {"type": "yarn", "factor": 2.0}}, "rope_scaling.short_factor is"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"lm_head_bias": True}, "lm_head_bias is true"),
        ({"full_attn_mod": 2}, "full_attn_mod is 2"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    """YaRN among it: with these fields it was a third rotation, of the first published code alone."""
    with pytest.raises(ConfigError, match=message):
        parse_config(PHI3, Fields(PUBLISHED | changes, ""))


@pytest.mark.parametrize(("most_tokens", "kind"), [(None, "long"), (4096, "short"), (4097, "long")])
def test_divisors_are_chosen_once_for_the_tokens_asked_for(most_tokens: int | None, kind: str) -> None:
    values = PUBLISHED | {"max_position_embeddings": 131072, "rope_scaling": LONG | {"type": "longrope"}}
    rotation = parse_config(PHI3, Fields(values, "", most_tokens=most_tokens)).rotations[0]
    assert rotation is not None
    plain = parse_config(PHI3, Fields(PUBLISHED, "")).rotations[0]
    assert plain is not None
    divisor_J = torch.tensor(LONG[f"{kind}_factor"], dtype=torch.float64)
    assert torch.equal(rotation.frequency_J, plain.frequency_J / divisor_J)


def test_whoever_opens_a_model_for_long_texts_is_told(tmp_path: Path) -> None:
    """The divisors are not those that transformers takes for a short text."""
    rope = {**LONG, "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": None}
    original = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    Phi3ForCausalLM(Phi3Config(**sizes, **heads, **original, rope_parameters=rope)).save_pretrained(tmp_path)
    told: list[str] = []
    open_model(str(tmp_path), report=told.append)
    assert len(told) == 1
    assert "texts of at most 4096 they would be scaled otherwise: open the model with a context of 4096" in told[0]
    open_model(str(tmp_path), context=4096, report=told.append)
    assert len(told) == 1


def gate_and_up_swapped(weights: LayerWeights) -> LayerWeights:
    gate = weights.mlp.gate
    assert gate is not None
    return replace(weights, mlp=replace(weights.mlp, gate=weights.mlp.up, up=gate))


def keys_and_values_swapped(weights: LayerWeights) -> LayerWeights:
    attention = weights.attention
    return replace(weights, attention=replace(attention, key=attention.value, value=attention.key))


def magnitude_left_out(layer: LayerConfig) -> LayerConfig:
    rotary = layer.attention.rotary
    assert rotary is not None
    return replace(layer, attention=replace(layer.attention, rotary=replace(rotary, attention_factor=1.0)))


WRONG: dict[str, dict[str, Any]] = {
    "gate and up swapped": {"on_layer": gate_and_up_swapped},
    "keys and values swapped": {"on_layer": keys_and_values_swapped},
    "magnitude left out": layers_with(magnitude_left_out),
    "interleaved": layers_with(other_layout),
    "window longer by one": layers_with(window_longer),
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Phi3Config(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=32,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "factor": 8.0,
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [1.0] * 4,
        },
        sliding_window=4,
        pad_token_id=None,
    )
    catches(Phi3ForCausalLM, config, WRONG)
