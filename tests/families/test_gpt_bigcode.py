"""GPT-BigCode beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from twinfer.spec.weights import EmbeddingWeights, LayerWeights

from .examples import drawn
from .llama_family import reads_alike
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> GPTBigCodeConfig:
    heads = draw(st.integers(1, 5))
    return GPTBigCodeConfig(
        vocab_size=draw(st.integers(3, 40)),
        n_positions=draw(st.integers(16, 64)),
        n_embd=heads * draw(st.integers(-(-3 // heads), 9)),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_inner=draw(st.one_of(st.none(), st.integers(1, 20))),
        activation_function=draw(st.sampled_from(["gelu_pytorch_tanh", "gelu", "gelu_new", "relu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        scale_attn_weights=draw(st.booleans()),
        attention_softmax_in_fp32=draw(st.booleans()),
        scale_attention_softmax_in_fp32=draw(st.booleans()),
        multi_query=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_gpt_bigcode(config: GPTBigCodeConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GPTBigCodeForCausalLM, config, seed)


def test_published_config_reads_as_transformers_reads_it() -> None:
    """StarCoder's."""
    older = published("starcoder")
    reads_alike(GPTBigCodeConfig, older)


def read_as_stacked(weights: LayerWeights) -> LayerWeights:
    """Four heads of three rows: what stands in the file head by head, taken for all queries, all keys, all values."""
    attention = weights.attention

    def in_file(part: str) -> Tensor:
        rows = [getattr(each, part).split(3) for each in (attention.query, attention.key, attention.value)]
        return torch.cat([piece for head in zip(*rows, strict=True) for piece in head])

    linears = [
        replace(attention.query, weight_NI=weight, bias_N=bias)
        for weight, bias in zip(in_file("weight_NI").chunk(3), in_file("bias_N").chunk(3), strict=True)
    ]
    return replace(weights, attention=replace(attention, query=linears[0], key=linears[1], value=linears[2]))


def key_and_value_swapped(weights: LayerWeights) -> LayerWeights:
    attention = weights.attention
    return replace(weights, attention=replace(attention, key=attention.value, value=attention.key))


def value_bias_dropped(weights: LayerWeights) -> LayerWeights:
    value = weights.attention.value
    assert value.bias_N is not None
    return replace(weights, attention=replace(weights.attention, value=replace(value, bias_N=value.bias_N * 0)))


def positions_late(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.position_PM is not None
    return replace(weights, position_PM=weights.position_PM.roll(-1, 0))


WRONG: dict[str, dict[str, Any]] = {
    "key and value swapped": {"on_layer": key_and_value_swapped},
    "bias of values dropped": {"on_layer": value_bias_dropped},
    "positions one late": {"on_embedding": positions_late},
}
SIZES: dict[str, Any] = {"vocab_size": 20, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 4}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    catches(GPTBigCodeForCausalLM, GPTBigCodeConfig(**SIZES, multi_query=True), WRONG)
    own_keys = WRONG | {"read as stacked": {"on_layer": read_as_stacked}}
    catches(GPTBigCodeForCausalLM, GPTBigCodeConfig(**SIZES, multi_query=False), own_keys)
