"""Gemma 2 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM

from twinfer.spec.weights import LayerWeights

from .llama_family import (
    attention_with,
    comparable,
    few,
    layers_with,
    reads_alike,
    rotating,
    seeds,
    sizes,
    window_longer,
    windowed,
)
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> Gemma2Config:
    fields = draw(sizes(divided=True, activation="hidden_activation"))
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return Gemma2Config(
        **draw(rotating(fields)),
        attention_bias=draw(st.booleans()),
        query_pre_attn_scalar=draw(st.integers(1, 20)),
        sliding_window=draw(st.integers(1, 14)),
        layer_types=draw(windowed(fields["num_hidden_layers"])),
        final_logit_softcapping=draw(st.sampled_from([None, 0.5, 30.0])),
        attn_logit_softcapping=draw(st.sampled_from([None, 0.5, 50.0])),
    )


@few
@given(config=configs(), seed=seeds)
def test_gemma2(config: Gemma2Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Gemma2ForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """Gemma 2 9B's config.json as it was first published; its caps may be left out, which is not the same as null."""
    older = published("gemma-2-9b")
    reads_alike(Gemma2Config, older)
    reads_alike(Gemma2Config, older | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        del older[cap]
    reads_alike(Gemma2Config, older)


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    """By the names that LLaMA's files have: the norm after attention taken for the one before the MLP."""
    return replace(weights, mlp_norm=weights.attention_output_norm, attention_output_norm=weights.mlp_norm)


WRONG: dict[str, dict[str, Any]] = {
    "norms swapped": {"on_layer": norms_swapped},
    "windows in the other layers": {"on_config": lambda config: replace(config, layers=config.layers[::-1])},
    "window one longer": layers_with(window_longer),
    "scores not capped": attention_with(softcap=None),
    "logits not capped": {"on_config": lambda config: replace(config, logit_softcap=None)},
    "scale of the head's size": attention_with(scale=6**-0.5),
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Gemma2Config(
        vocab_size=20,
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=4,
        query_pre_attn_scalar=9,
    )
    catches(Gemma2ForCausalLM, config, WRONG)
