"""BLOOM beside transformers, over everything that its config class lets vary."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom import modeling_bloom

from twinfer.checkpoint import alibi
from twinfer.checkpoint.families.bloom import BLOOM, TRAINED_CONTEXT
from twinfer.checkpoint.family import parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.config import ModelConfig, NormPlacement
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import EmbeddingWeights, LayerWeights

from .examples import drawn


@pytest.fixture(autouse=True, scope="module")
def _exact_gelu() -> Iterator[None]:
    """Transformers keeps eight digits of the root of 2/pi here, which alone would be as much as may differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_bloom, "bloom_gelu_forward", lambda x: functional.gelu(x, approximate="tanh"))
        yield


@st.composite
def configs(draw: st.DrawFn) -> BloomConfig:
    heads, ranks = draw(st.integers(1, 7)), draw(st.integers(1, 2))
    return BloomConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=heads * draw(st.integers(1, 5)) + (2 * heads if heads <= 2 else 0),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        apply_residual_connection_post_layernorm=draw(st.booleans()),
        pretraining_tp=ranks,
        slow_but_exact=draw(st.booleans()) and ranks == 1,  # with more, transformers leaves two biases out
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_bloom(config: BloomConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(BloomForCausalLM, config, seed)


def added_to_the_stream(model: ModelConfig) -> ModelConfig:
    return replace(model, layers=tuple(replace(layer, norm_placement=NormPlacement.PRE_NORM) for layer in model.layers))


def stacked(weights: LayerWeights) -> LayerWeights:
    """Queries, keys and values taken from thirds of the merged projection, of 6 heads of 4."""
    parts = [weights.attention.query, weights.attention.key, weights.attention.value]

    def merged(tensors: list[Tensor | None]) -> list[Tensor]:
        heads = [each.reshape(6, 4, *each.shape[1:]) for each in tensors if each is not None]
        return list(torch.stack(heads, 1).flatten(0, 2).chunk(3))

    weight, bias = merged([part.weight_NI for part in parts]), merged([part.bias_N for part in parts])
    query, key, value = (replace(part, weight_NI=weight[i], bias_N=bias[i]) for i, part in enumerate(parts))
    return replace(weights, attention=replace(weights.attention, query=query, key=key, value=value))


def slopes_in_one_series(weights: LayerWeights) -> LayerWeights:
    """As for a power of two, which 6 heads are not."""
    slope_H = 2.0 ** (-8 * torch.arange(1, 7, dtype=torch.float64) / 6)
    assert not torch.equal(slope_H, alibi.slopes(6))
    return replace(weights, attention=replace(weights.attention, alibi_slope_H=slope_H))


def norm_left_out(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.norm is not None
    return replace(weights, norm=replace(weights.norm, gain_M=torch.ones_like(weights.norm.gain_M)))


WRONG: dict[str, dict[str, Any]] = {
    "added to the stream": {"on_config": added_to_the_stream},
    "merged projection in thirds": {"on_layer": stacked},
    "slopes in one series": {"on_layer": slopes_in_one_series},
    "gain of the embeddings' norm left out": {"on_embedding": norm_left_out},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = BloomConfig(
        vocab_size=20, hidden_size=24, n_layer=2, n_head=6, apply_residual_connection_post_layernorm=True
    )
    catches(BloomForCausalLM, config, WRONG)


OLDER = {
    "vocab_size": 9,
    "n_embed": 8,
    "n_layer": 1,
    "num_attention_heads": 2,
    "n_inner": None,
    "seq_length": 64,
    "offset_alibi": 100,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "attention_softmax_in_fp32": True,
    "masked_softmax_fusion": True,
    "bias_dropout_fusion": True,
    "unk_token_id": 0,
}
"""With fields as bigscience/bloom-560m has them."""


def test_older_names_mean_the_same() -> None:
    newer = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "n_head": 2}
    older, plain = (parse_config(BLOOM, Fields(each, "")).config for each in (OLDER, newer))
    assert older.context == 64
    assert plain == replace(older, context=TRAINED_CONTEXT)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_inner", 31, "must be null"),
        ("skip_bias_add_qkv", True, "must be false"),
        ("hidden_size", 16, "left out"),
    ],
)
def test_what_is_not_computed_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(BLOOM, Fields(OLDER | {field: value}, ""))
