"""OPT beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

from twinfer.spec.config import ModelConfig, NormPlacement
from twinfer.spec.weights import EmbeddingWeights, LayerWeights

from .examples import drawn


@st.composite
def configs(draw: st.DrawFn) -> OPTConfig:
    heads = draw(st.integers(1, 4))
    return OPTConfig(
        vocab_size=draw(st.integers(3, 40)),
        max_position_embeddings=draw(st.integers(11, 64)),
        hidden_size=heads * draw(st.integers(1, 9)) + (2 * heads if heads <= 2 else 0),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        ffn_dim=draw(st.integers(1, 20)),
        word_embed_proj_dim=draw(st.one_of(st.none(), st.integers(1, 12))),
        do_layer_norm_before=draw(st.booleans()),
        _remove_final_layer_norm=draw(st.booleans()),
        activation_function=draw(st.sampled_from(["relu", "gelu", "gelu_new"])),
        enable_bias=draw(st.booleans()),
        layer_norm_elementwise_affine=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(8)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_opt(config: OPTConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(OPTForCausalLM, config, seed)


def offset_missing(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.position_PM is not None
    return replace(weights, position_PM=weights.position_PM.roll(2, 0))


def norms_before(model: ModelConfig) -> ModelConfig:
    return replace(model, layers=tuple(replace(layer, norm_placement=NormPlacement.PRE_NORM) for layer in model.layers))


def norms_moved(weights: LayerWeights) -> LayerWeights:
    return replace(
        weights,
        attention_norm=weights.attention_output_norm,
        mlp_norm=weights.mlp_output_norm,
        attention_output_norm=None,
        mlp_output_norm=None,
    )


def output_norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(
        weights, attention_output_norm=weights.mlp_output_norm, mlp_output_norm=weights.attention_output_norm
    )


def bias_dropped(weights: LayerWeights) -> LayerWeights:
    query = weights.attention.query
    assert query.bias_N is not None
    return replace(weights, attention=replace(weights.attention, query=replace(query, bias_N=query.bias_N * 0)))


WRONG: dict[str, dict[str, Any]] = {
    "positions from the first row": {"on_embedding": offset_missing},
    "norms before": {"on_config": norms_before, "on_layer": norms_moved},
    "norms swapped": {"on_layer": output_norms_swapped},
    "bias of queries dropped": {"on_layer": bias_dropped},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = OPTConfig(
        vocab_size=20,
        max_position_embeddings=32,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_dim=9,
        word_embed_proj_dim=7,
        do_layer_norm_before=False,
    )
    catches(OPTForCausalLM, config, WRONG)
