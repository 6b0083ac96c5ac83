"""GPT-2 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from twinfer.spec.weights import EmbeddingWeights, LayerWeights

from .examples import drawn


@st.composite
def configs(draw: st.DrawFn) -> GPT2Config:
    heads = draw(st.integers(1, 4))
    return GPT2Config(
        vocab_size=draw(st.integers(3, 40)),
        n_positions=draw(st.integers(16, 64)),
        n_embd=heads * draw(st.integers(1, 9)) + (2 * heads if heads == 1 else 0),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_inner=draw(st.one_of(st.none(), st.integers(1, 20))),
        activation_function=draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        scale_attn_weights=draw(st.booleans()),
        scale_attn_by_inverse_layer_idx=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(8)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_gpt2(config: GPT2Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(GPT2LMHeadModel, config, seed)


def positions_late(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.position_PM is not None
    return replace(weights, position_PM=weights.position_PM.roll(-1, 0))


def bias_dropped(weights: LayerWeights) -> LayerWeights:
    down = weights.mlp.down
    assert down.bias_N is not None
    return replace(weights, mlp=replace(weights.mlp, down=replace(down, bias_N=down.bias_N * 0)))


def query_and_key_swapped(weights: LayerWeights) -> LayerWeights:
    attention = weights.attention
    return replace(weights, attention=replace(attention, query=attention.key, key=attention.query))


WRONG: dict[str, dict[str, Any]] = {
    "positions one late": {"on_embedding": positions_late},
    "bias dropped": {"on_layer": bias_dropped},
    "query and key swapped": {"on_layer": query_and_key_swapped},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    catches(GPT2LMHeadModel, GPT2Config(vocab_size=20, n_positions=32, n_embd=12, n_layer=2, n_head=3), WRONG)
