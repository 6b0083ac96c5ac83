"""LLaMA and Mistral beside transformers, over everything that their config classes let vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from twinfer.spec.weights import LayerWeights

few = settings(max_examples=8)
seeds = st.integers(0, 2**31)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": kv_heads * group * draw(st.integers(1, 5)) + draw(st.integers(0, 1)) * kv_heads * group,
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": kv_heads * group,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        "max_position_embeddings": draw(st.integers(16, 64)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6, 0.25])),
        "tie_word_embeddings": draw(st.booleans()),
    }


@few
@given(config=sizes(), attention_bias=st.booleans(), mlp_bias=st.booleans(), seed=seeds)
def test_llama(
    config: dict[str, Any], attention_bias: bool, mlp_bias: bool, seed: int, agrees: Callable[..., None]
) -> None:
    agrees(LlamaForCausalLM, LlamaConfig(**config, attention_bias=attention_bias, mlp_bias=mlp_bias), seed)


@few
@given(config=sizes(), window=st.one_of(st.none(), st.integers(1, 14)), seed=seeds)
def test_mistral(config: dict[str, Any], window: int | None, seed: int, agrees: Callable[..., None]) -> None:
    agrees(MistralForCausalLM, MistralConfig(**config, sliding_window=window), seed)


def interleaved(weights: LayerWeights) -> LayerWeights:
    """Query rows as GGUF keeps them."""

    def permuted(weight_NI: Tensor) -> Tensor:
        return weight_NI.view(4, 2, 4, -1).transpose(1, 2).reshape(weight_NI.shape)

    query = weights.attention.query
    return replace(
        weights, attention=replace(weights.attention, query=replace(query, weight_NI=permuted(query.weight_NI)))
    )


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    catches(
        LlamaForCausalLM,
        config,
        {"unpermuted rotary": {"on_layer": interleaved}, "norms swapped": {"on_layer": norms_swapped}},
    )
