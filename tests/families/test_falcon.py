"""Falcon beside transformers, in its three forms and what its config class lets vary of each."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import FalconConfig, FalconForCausalLM

from twinfer.checkpoint.families.falcon import FALCON, REFINED_WEB, REFINED_WEB_MODEL
from twinfer.checkpoint.family import Family, parse_config
from twinfer.checkpoint.fields import Fields
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .examples import drawn


@st.composite
def configs(draw: st.DrawFn, form: str) -> FalconConfig:
    """Of the form of 7B, 40B or RW; alibi and rotary positions in each, biases or not."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, size = kv_heads * group, 2 * draw(st.integers(2, 4))
    scalings: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    ]
    forms: dict[str, dict[str, Any]] = {
        "7B": {"multi_query": True, "parallel_attn": True, "num_ln_in_parallel_attn": draw(st.sampled_from([None, 1]))},
        "40B": {
            "new_decoder_architecture": True,
            "num_kv_heads": kv_heads,
            "multi_query": draw(st.booleans()),
            "num_ln_in_parallel_attn": draw(st.sampled_from([None, 1, 2])),
        },
        "RW": {"multi_query": draw(st.booleans()), "parallel_attn": draw(st.booleans())},
    }
    return FalconConfig(
        vocab_size=draw(st.integers(3, 40)),
        hidden_size=heads * size,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        alibi=draw(st.booleans()),
        bias=draw(st.booleans()),
        max_position_embeddings=draw(st.integers(16, 64)),
        rope_parameters={"rope_theta": draw(st.sampled_from([1e4, 5e5])), **draw(st.sampled_from(scalings))},
        ffn_hidden_size=draw(st.one_of(st.none(), st.integers(1, 20))),
        activation=draw(st.sampled_from(["gelu", "gelu_new", "relu", "silu"])),
        tie_word_embeddings=draw(st.booleans()),
        **forms[form],
    )


@pytest.mark.parametrize("form", ["7B", "40B", "RW"])
@drawn(4)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_falcon(form: str, data: st.DataObject, seed: int, agrees: Callable[..., None]) -> None:
    agrees(FalconForCausalLM, data.draw(configs(form)), seed)


def slopes_unscaled(weights: LayerWeights) -> LayerWeights:
    slope_H = weights.attention.alibi_slope_H
    assert slope_H is not None
    return replace(weights, attention=replace(weights.attention, alibi_slope_H=slope_H * 2))  # the root of 4 elements


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)


def grouped_by_modulo(weights: LayerWeights) -> LayerWeights:
    """Head h reads key/value head h % K: of 6 heads of 4, and 2 of keys and values."""
    query, output = weights.attention.query, weights.attention.output
    rows = torch.arange(24).view(3, 2, 4).transpose(0, 1).flatten()
    return replace(
        weights,
        attention=replace(
            weights.attention,
            query=replace(query, weight_NI=query.weight_NI[rows]),
            output=replace(output, weight_NI=output.weight_NI[:, rows]),
        ),
    )


def key_and_value_swapped(weights: LayerWeights) -> LayerWeights:
    attention = weights.attention
    return replace(weights, attention=replace(attention, key=attention.value, value=attention.key))


WRONG: dict[str, dict[str, Any]] = {
    "slopes not scaled": {"on_layer": slopes_unscaled},
    "norms swapped": {"on_layer": norms_swapped},
    "heads grouped by modulo": {"on_layer": grouped_by_modulo},
    "key and value swapped": {"on_layer": key_and_value_swapped},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    config = FalconConfig(
        vocab_size=20,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_kv_heads=2,
        new_decoder_architecture=True,
        alibi=True,
    )
    catches(FalconForCausalLM, config, WRONG)


SIZES: dict[str, Any] = {"vocab_size": 9, "hidden_size": 16}
OLDER = SIZES | {"n_layer": 1, "n_head": 4, "apply_residual_connection_post_layernorm": False}
NEWER = SIZES | {"num_hidden_layers": 1, "num_attention_heads": 4, "model_type": "falcon"}


@pytest.mark.parametrize(
    ("family", "older", "newer"),
    [
        (
            REFINED_WEB,  # tiiuae/falcon-40b, as first published
            {"model_type": "RefinedWeb", "n_head_kv": 2, "parallel_attn": True},
            {"new_decoder_architecture": True, "num_kv_heads": 2},
        ),
        (
            REFINED_WEB_MODEL,  # tiiuae/falcon-7b
            {"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True},
            {"multi_query": True, "num_kv_heads": 4},
        ),
        (
            REFINED_WEB_MODEL,  # tiiuae/falcon-rw-1b
            {"model_type": "RefinedWebModel", "alibi": True, "bias": True},
            {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        ),
    ],
)
def test_older_names_mean_the_same(family: Family, older: dict[str, Any], newer: dict[str, Any]) -> None:
    older["auto_map"] = {
        "AutoConfig": "configuration_RW.RWConfig",
        "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
    }
    read = parse_config(family, Fields(OLDER | older, ""))
    assert read.config == parse_config(FALCON, Fields(NEWER | newer, "")).config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn is false; it must be true"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2; it must be null"),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads is 2; it must be 4"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "kv_heads is 3; it must be a divisor of heads"),
        ({"apply_residual_connection_post_layernorm": True}, "must be false"),
        ({"ff_factor": 3}, "ff_factor is 3"),
    ],
)
def test_what_is_not_computed_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(FALCON, Fields(NEWER | fields, ""))
