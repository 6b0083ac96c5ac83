"""Granite beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM

from .llama_family import attention_with, comparable, few, layers_with, reads_alike, rotating, seeds, sizes
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> GraniteConfig:
    factors = st.sampled_from([1.0, 0.22, 3])
    return GraniteConfig(
        **draw(rotating(draw(sizes()))),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        attention_multiplier=draw(factors),
        embedding_multiplier=draw(factors),
        residual_multiplier=draw(factors),
        logits_scaling=draw(factors),
    )


@few
@given(config=configs(), seed=seeds)
def test_granite(config: GraniteConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GraniteForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """Granite 3.0 2B's config.json."""
    older = published("granite-3.0-2b")
    reads_alike(GraniteConfig, older)


WRONG: dict[str, dict[str, Any]] = {
    "scale of the head's size": attention_with(scale=4**-0.5),
    "tokens not scaled": {"on_config": lambda config: replace(config, embedding_scale=1.0)},
    "what layers add not scaled": layers_with(lambda layer: replace(layer, residual_scale=1.0)),
    "logits multiplied": {"on_config": lambda config: replace(config, logit_scale=1 / config.logit_scale)},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = GraniteConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=0.3,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=8.0,
    )
    catches(GraniteForCausalLM, config, WRONG)
