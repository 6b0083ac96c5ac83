"""StableLM beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import StableLmConfig, StableLmForCausalLM

from twinfer.spec.config import LayerConfig, Residual
from twinfer.spec.weights import LayerWeights, NormWeights

from .llama_family import ACTIVATIONS, comparable, few, layers_with, other_layout, reads_alike, scalings, seeds
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> StableLmConfig:
    kv_heads, group, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(3, 9))
    context, turning = draw(st.integers(16, 64)), 2 * draw(st.integers(1, size // 2))
    rotary = draw(scalings(turning, context)) | {"partial_rotary_factor": min(1.0, (turning + 0.5) / size)}
    return StableLmConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=kv_heads * group * size,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        hidden_act=draw(st.sampled_from(ACTIVATIONS)),
        max_position_embeddings=context,
        layer_norm_eps=draw(st.sampled_from([1e-5, 0.25])),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=rotary,
        use_qkv_bias=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        use_parallel_residual=draw(st.booleans()),
    )


@few
@given(config=configs(), seed=seeds)
def test_stablelm(config: StableLmConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(StableLmForCausalLM, config, seed, **comparable(config))


def test_published_config_reads_as_transformers_reads_it() -> None:
    """StableLM 2 12B's."""
    older = published("stablelm-2-12b")
    reads_alike(StableLmConfig, older)
    reads_alike(StableLmConfig, {name: value for name, value in older.items() if name != "partial_rotary_factor"})


def sequential(layer: LayerConfig) -> LayerConfig:
    return replace(layer, residual=Residual.SEQUENTIAL)


def same_norm_twice(weights: LayerWeights) -> LayerWeights:
    return replace(weights, mlp_norm=weights.attention_norm)


def heads_norms_in_turn(weights: LayerWeights) -> LayerWeights:
    """Four heads of eight: each with the next one's norm."""
    norm = weights.attention.query_norm
    assert norm is not None
    return replace(weights, attention=replace(weights.attention, query_norm=NormWeights(gain_M=norm.gain_M.roll(8))))


def query_bias_dropped(weights: LayerWeights) -> LayerWeights:
    query = weights.attention.query
    assert query.bias_N is not None
    return replace(weights, attention=replace(weights.attention, query=replace(query, bias_N=query.bias_N * 0)))


WRONG: dict[str, dict[str, Any]] = {
    "sequential": layers_with(sequential) | {"on_layer": same_norm_twice},
    "interleaved": layers_with(other_layout),
    "norms of heads in turn": {"on_layer": heads_norms_in_turn},
    "bias of queries dropped": {"on_layer": query_bias_dropped},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = StableLmConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        qk_layernorm=True,
        use_qkv_bias=True,
        use_parallel_residual=True,
    )
    catches(StableLmForCausalLM, config, WRONG)
