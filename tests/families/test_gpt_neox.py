"""GPT-NeoX beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from twinfer.checkpoint.families.gpt_neox import GPT_NEOX
from twinfer.checkpoint.family import parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import LayerConfig, ModelConfig, Residual, RotaryLayout
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .examples import drawn


@st.composite
def scalings(draw: st.DrawFn, context: int, turning: int) -> dict[str, Any]:
    """Of rotary positions of which `turning` elements of a head rotate."""
    kinds = ["default", "linear", "llama3", "longrope"]
    kinds += ["dynamic"] if turning != 2 else []  # of two elements, transformers divides by zero
    kinds += ["yarn"] if turning % 2 == 0 else []  # of odd sizes, transformers blends a pair too few
    kind = draw(st.sampled_from(kinds))
    factor, pairs = draw(st.sampled_from([1.0, 2.5, 8.0])), (turning + 1) // 2
    divisors = st.lists(st.sampled_from([1.0, 1.5, 4.0]), min_size=pairs, max_size=pairs)
    own: dict[str, dict[str, Any]] = {
        "default": {},
        "linear": {"factor": factor},
        "dynamic": {"factor": factor},
        "llama3": {
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": draw(st.integers(8, 64)),
        },
        "longrope": {"factor": factor, "short_factor": draw(divisors), "long_factor": draw(divisors)}
        | {"original_max_position_embeddings": context},
        "yarn": {"factor": factor, "original_max_position_embeddings": draw(st.integers(8, context))},
    }
    return {"rope_type": kind, "rope_theta": draw(st.sampled_from([10000.0, 100.0, 500000.0])), **own[kind]}


@st.composite
def configs(draw: st.DrawFn) -> GPTNeoXConfig:
    heads, size, context = draw(st.integers(1, 4)), 2 * draw(st.integers(2, 5)), draw(st.integers(16, 64))
    part = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    return GPTNeoXConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=heads * size,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 20)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new", "gelu_fast", "relu", "silu"])),
        max_position_embeddings=context,
        layer_norm_eps=draw(st.sampled_from([1e-5, 0.25])),
        use_parallel_residual=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        rope_parameters={"partial_rotary_factor": part, **draw(scalings(context, int(size * part)))},
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_gpt_neox(config: GPTNeoXConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GPTNeoXForCausalLM, config, seed)


def in_every_layer(change: Callable[[LayerConfig], LayerConfig]) -> Callable[[ModelConfig], ModelConfig]:
    return lambda model: replace(model, layers=tuple(change(layer) for layer in model.layers))


def interleaved(layer: LayerConfig) -> LayerConfig:
    assert layer.attention.rotary is not None
    rotary = replace(layer.attention.rotary, layout=RotaryLayout.INTERLEAVED)
    return replace(layer, attention=replace(layer.attention, rotary=rotary))


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)


def stacked(weights: LayerWeights) -> LayerWeights:
    """Queries, keys and values taken from thirds of the merged projection, of 3 heads of 8."""
    parts = [weights.attention.query, weights.attention.key, weights.attention.value]

    def merged(tensors: list[Tensor | None]) -> list[Tensor]:
        heads = [each.reshape(3, 8, *each.shape[1:]) for each in tensors if each is not None]
        return list(torch.stack(heads, 1).flatten(0, 2).chunk(3))

    weight, bias = merged([part.weight_NI for part in parts]), merged([part.bias_N for part in parts])
    query, key, value = (replace(part, weight_NI=weight[i], bias_N=bias[i]) for i, part in enumerate(parts))
    return replace(weights, attention=replace(weights.attention, query=query, key=key, value=value))


WRONG: dict[str, dict[str, Any]] = {
    "neighbors rotate": {"on_config": in_every_layer(interleaved)},
    "one after the other": {
        "on_config": in_every_layer(lambda layer: replace(layer, residual=Residual.SEQUENTIAL)),
    },
    "norms swapped": {"on_layer": norms_swapped},
    "merged projection in thirds": {"on_layer": stacked},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = GPTNeoXConfig(
        vocab_size=20,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=12,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )
    catches(GPTNeoXForCausalLM, config, WRONG)


PLAIN = {
    "vocab_size": 9,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "max_position_embeddings": 8,
}


@pytest.mark.parametrize(
    "rotary",
    [
        {"rotary_pct": 0.5, "rotary_emb_base": 100},
        {"partial_rotary_factor": 0.5, "rope_theta": 100.0},
        {"rotary_pct": 0.5, "rotary_emb_base": 100, "partial_rotary_factor": 0.5, "rope_theta": 100},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 100.0, "rope_type": "default"}},
        {"rotary_pct": 0.5, "rotary_emb_base": 100, "rope_scaling": None},
    ],
)
def test_rotary_fields_are_read_in_every_spelling(rotary: dict[str, Any]) -> None:
    parsed = parse_config(GPT_NEOX, Fields(PLAIN | rotary, ""))
    (rotation,) = parsed.rotations
    assert rotation is not None
    assert rotation.config.size == 4
    assert rotation.frequency_J.tolist() == [1.0, 0.1]


def test_a_quarter_of_each_head_rotates_where_nothing_is_said() -> None:
    (rotation,) = parse_config(GPT_NEOX, Fields(PLAIN, "")).rotations
    assert rotation is not None
    assert rotation.config.size == 2


def test_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError, match="rope_theta is 200; it must be as rotary_emb_base is"):
        parse_config(GPT_NEOX, Fields(PLAIN | {"rotary_emb_base": 100, "rope_theta": 200}, ""))
