"""Gemma beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GemmaConfig, GemmaForCausalLM

from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.family import find, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import Activation, LayerConfig
from twinfer.spec.errors import ConfigError

from .llama_family import comparable, few, layers_with, reads_alike, rotating, seeds, sizes
from .published_config import published

OLDER = published("gemma-2b-first")
"""Gemma 2B's config.json as it was first published."""


@st.composite
def configs(draw: st.DrawFn) -> GemmaConfig:
    fields = draw(sizes())
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    return GemmaConfig(**draw(rotating(fields)), attention_bias=draw(st.booleans()))


@few
@given(config=configs(), seed=seeds)
def test_gemma(config: GemmaConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GemmaForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """Whichever of the two fields says it, and by whichever name, the activation is the approximation."""
    newer = OLDER | {"hidden_activation": None}
    for config in (OLDER, newer, newer | {"hidden_activation": "gelu_pytorch_tanh"}):
        reads_alike(GemmaConfig, config)


@pytest.mark.parametrize("field", [{"hidden_activation": "relu"}, {"use_bidirectional_attention": True}])
def test_what_is_not_computed_is_refused(field: dict[str, Any]) -> None:
    config = Fields(OLDER | field, "config.json: ")
    with pytest.raises(ConfigError, match=next(iter(field))):
        parse_config(find(FAMILIES, config), config)


def gains_from_zero(layer: LayerConfig) -> LayerConfig:
    return replace(layer, norm=replace(layer.norm, gain_from_one=False))


def exact_gelu(layer: LayerConfig) -> LayerConfig:
    return replace(layer, mlp=replace(layer.mlp, activation=Activation.GELU))


WRONG: dict[str, dict[str, Any]] = {
    "gains from zero": layers_with(gains_from_zero),
    "exact GELU": layers_with(exact_gelu),
    "tokens not scaled": {"on_config": lambda config: replace(config, embedding_scale=1.0)},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = GemmaConfig(
        vocab_size=20,
        hidden_size=10,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    catches(GemmaForCausalLM, config, WRONG)
