"""Qwen 3 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from twinfer.spec.config import QkNormSpan
from twinfer.spec.weights import LayerWeights

from .llama_family import attention_with, comparable, few, reads_alike, rotating, seeds, sizes, windowed
from .published_config import published


@st.composite
def configs(draw: st.DrawFn) -> Qwen3Config:
    fields = draw(sizes())
    fields["head_dim"] = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    fields = draw(rotating(fields)) | {"attention_bias": draw(st.booleans())}
    if draw(st.booleans()):
        fields |= {
            "use_sliding_window": True,
            "sliding_window": draw(st.integers(1, 14)),
            "max_window_layers": draw(st.integers(0, 4)),
            "layer_types": draw(windowed(fields["num_hidden_layers"])),
        }
    return Qwen3Config(**fields)


@few
@given(config=configs(), seed=seeds)
def test_qwen3(config: Qwen3Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Qwen3ForCausalLM, config, seed, **comparable(config))


def test_published_config() -> None:
    """Qwen3-0.6B's config.json; and without head_dim, which then is 128 whatever the hidden size."""
    older = published("qwen3-0.6b")
    reads_alike(Qwen3Config, older)
    del older["head_dim"]
    reads_alike(Qwen3Config, older)


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    attention = weights.attention
    assert attention.query_norm is not None
    assert attention.key_norm is not None
    size = len(attention.key_norm.gain_M) // 2  # of one head, of two for the keys
    query = replace(attention.query_norm, gain_M=attention.key_norm.gain_M[:size].repeat(4))
    key = replace(attention.key_norm, gain_M=attention.query_norm.gain_M[:size].repeat(2))
    return replace(weights, attention=replace(attention, query_norm=query, key_norm=key))


def gains_spread(weights: LayerWeights) -> LayerWeights:
    """Gains of all heads in turn, as if each element's were stored head after head."""
    attention = weights.attention
    assert attention.query_norm is not None
    gain_M = attention.query_norm.gain_M.view(4, -1).T.reshape(-1)
    return replace(weights, attention=replace(attention, query_norm=replace(attention.query_norm, gain_M=gain_M)))


WRONG: dict[str, dict[str, Any]] = {
    "norms of queries and keys swapped": {"on_layer": norms_swapped},
    "gains in another order": {"on_layer": gains_spread},
    "norm over all heads": attention_with(qk_norm_span=QkNormSpan.ALL_HEADS),
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Qwen3Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
    )
    catches(Qwen3ForCausalLM, config, WRONG)
