"""StarCoder 2 beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from twinfer.spec.weights import LayerWeights

from .llama_family import comparable, few, layers_with, other_layout, rotating, seeds, sizes, window_longer


@st.composite
def configs(draw: st.DrawFn) -> Starcoder2Config:
    return Starcoder2Config(
        **draw(rotating(draw(sizes(eps="norm_epsilon")))),
        use_bias=draw(st.booleans()),
        sliding_window=draw(st.one_of(st.none(), st.integers(1, 14))),
        bos_token_id=None,
        eos_token_id=None,
    )


@few
@given(config=configs(), seed=seeds)
def test_starcoder2(config: Starcoder2Config, seed: int, agrees: Callable[..., None]) -> None:
    agrees(Starcoder2ForCausalLM, config, seed, **comparable(config))


def norm_bias_dropped(weights: LayerWeights) -> LayerWeights:
    norm = weights.mlp_norm
    assert norm is not None
    assert norm.bias_M is not None
    return replace(weights, mlp_norm=replace(norm, bias_M=norm.bias_M * 0))


WRONG: dict[str, dict[str, Any]] = {
    "bias of a norm dropped": {"on_layer": norm_bias_dropped},
    "window one longer": layers_with(window_longer),
    "rotary layout": layers_with(other_layout),
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = Starcoder2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    catches(Starcoder2ForCausalLM, config, WRONG)
