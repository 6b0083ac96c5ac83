"""OLMo 2 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import Olmo2Config, Olmo2ForCausalLM

from twinfer.spec.config import LayerConfig, NormPlacement, QkNormSpan
from twinfer.spec.weights import LayerWeights

from .llama_family import attention_with, comparable, few, reads_alike, rotating, seeds, sizes
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> Olmo2Config:
    return Olmo2Config(**draw(rotating(draw(sizes()))), attention_bias=draw(st.booleans()))


@few
@given(config=configs(), seed=seeds)
def test_olmo2(config: Olmo2Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Olmo2ForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """OLMo-2-1124-7B's config.json; and without rms_norm_eps, which then is 1e-5."""
    older = published("olmo-2-7b")
    reads_alike(Olmo2Config, older)
    del older["rms_norm_eps"]
    reads_alike(Olmo2Config, older)


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(
        weights, attention_output_norm=weights.mlp_output_norm, mlp_output_norm=weights.attention_output_norm
    )


def norms_before(weights: LayerWeights) -> LayerWeights:
    return replace(
        weights,
        attention_norm=weights.attention_output_norm,
        mlp_norm=weights.mlp_output_norm,
        attention_output_norm=None,
        mlp_output_norm=None,
    )


def placed_before(layer: LayerConfig) -> LayerConfig:
    return replace(layer, norm_placement=NormPlacement.PRE_NORM)


WRONG: dict[str, dict[str, Any]] = {
    "norm of each head": attention_with(qk_norm_span=QkNormSpan.HEAD),
    "norms swapped": {"on_layer": norms_swapped},
    "norms before": {
        "on_layer": norms_before,
        "on_config": lambda config: replace(config, layers=tuple(map(placed_before, config.layers))),
    },
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Olmo2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=None,
    )
    catches(Olmo2ForCausalLM, config, WRONG)
