"""Phi beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import PhiConfig, PhiForCausalLM

from twinfer.spec.config import LayerConfig, Residual
from twinfer.spec.weights import HeadWeights, LayerWeights

from .llama_family import ACTIVATIONS, comparable, few, layers_with, other_layout, reads_alike, scalings, seeds
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> PhiConfig:
    kv_heads, group, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(3, 9))
    context, turning = draw(st.integers(16, 64)), 2 * draw(st.integers(1, size // 2))
    rotary = draw(scalings(turning, context)) | {"partial_rotary_factor": min(1.0, (turning + 0.5) / size)}
    return PhiConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=kv_heads * group * size,
        intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=kv_heads * group,
        num_key_value_heads=draw(st.sampled_from([kv_heads, None])),
        hidden_act=draw(st.sampled_from(["gelu_new", *ACTIVATIONS])),
        max_position_embeddings=context,
        layer_norm_eps=draw(st.sampled_from([1e-5, 0.25])),
        tie_word_embeddings=draw(st.booleans()),
        rope_parameters=rotary,
        qk_layernorm=draw(st.booleans()),
    )


@few
@given(config=configs(), seed=seeds)
def test_phi(config: PhiConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(PhiForCausalLM, config, seed, **comparable(config))


def test_published_config_reads_as_transformers_reads_it() -> None:
    """Phi 2's."""
    older = published("phi-2-first")
    reads_alike(PhiConfig, older)
    reads_alike(PhiConfig, {name: value for name, value in older.items() if name != "partial_rotary_factor"})


def sequential(layer: LayerConfig) -> LayerConfig:
    """The MLP reads the stream with attention added, through a norm of the same gains."""
    return replace(layer, residual=Residual.SEQUENTIAL)


def same_norm_twice(weights: LayerWeights) -> LayerWeights:
    return replace(weights, mlp_norm=weights.attention_norm)


def gains_moved_on(weights: LayerWeights) -> LayerWeights:
    norm = weights.attention.query_norm
    assert norm is not None
    moved = replace(norm, gain_M=norm.gain_M.roll(1))
    return replace(weights, attention=replace(weights.attention, query_norm=moved))


def head_bias_dropped(weights: HeadWeights) -> HeadWeights:
    assert weights.bias_V is not None
    return replace(weights, bias_V=weights.bias_V * 0)


def output_bias_dropped(weights: LayerWeights) -> LayerWeights:
    output = weights.attention.output
    assert output.bias_N is not None
    return replace(weights, attention=replace(weights.attention, output=replace(output, bias_N=output.bias_N * 0)))


WRONG: dict[str, dict[str, Any]] = {
    "sequential": layers_with(sequential) | {"on_layer": same_norm_twice},
    "interleaved": layers_with(other_layout),
    "gains moved on": {"on_layer": gains_moved_on},
    "bias of the head dropped": {"on_head": head_bias_dropped},
    "bias of the output dropped": {"on_layer": output_bias_dropped},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = PhiConfig(
        vocab_size=20,
        hidden_size=24,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        qk_layernorm=True,
    )
    catches(PhiForCausalLM, config, WRONG)
