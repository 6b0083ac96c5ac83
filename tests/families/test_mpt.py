"""MPT beside transformers, over everything that its config class lets vary and its first code computes.

transformers reads two fields and computes as if they had their usual values; the oracle here takes them at their word.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import MptConfig
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from twinfer.checkpoint import open_model
from twinfer.spec.config import ModelConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .examples import drawn
from .llama_family import reads_alike
from .published_config import published


class MptForCausalLM(transformers.MptForCausalLM):  # type: ignore[misc]
    """The model whose `alibi_bias_max` and `expansion_ratio` count."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config)
        width = config.expansion_ratio * config.d_model
        for block in self.transformer.blocks:
            block.ffn.up_proj = torch.nn.Linear(config.d_model, width, bias=False)
            block.ffn.down_proj = torch.nn.Linear(width, config.d_model, bias=False)

        def alibi(heads: int, length: int, device: torch.device | None = None) -> torch.Tensor:
            return build_mpt_alibi_tensor(heads, length, config.attn_config.alibi_bias_max, device)

        self.transformer.build_mpt_alibi_tensor = alibi


@st.composite
def configs(draw: st.DrawFn) -> MptConfig:
    heads = draw(st.integers(1, 6))
    attention: dict[str, Any] = {
        "clip_qkv": draw(st.one_of(st.none(), st.sampled_from([0.125, 0.5, 6.0]))),
        "softmax_scale": draw(st.one_of(st.none(), st.sampled_from([0.1, 1.0]))),
        "alibi_bias_max": draw(st.integers(1, 16)),
        "attn_impl": draw(st.sampled_from(["torch", "flash", "triton"])),
    }
    return MptConfig(
        attn_config=attention,
        d_model=heads * draw(st.integers(-(-3 // heads), 6)),
        n_heads=heads,
        n_layers=draw(st.integers(1, 3)),
        expansion_ratio=draw(st.integers(1, 4)),
        max_seq_len=draw(st.integers(16, 64)),
        vocab_size=draw(st.integers(3, 40)),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
        learned_pos_emb=draw(st.booleans()),
        embedding_fraction=draw(st.sampled_from([0.5, 1.0])),
        norm_type=draw(st.sampled_from(["low_precision_layernorm", "layernorm"])),
        tie_word_embeddings=draw(st.booleans()),
    )


@drawn(6)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_mpt(config: MptConfig, seed: int, agrees: Callable[..., None]) -> None:
    agrees(MptForCausalLM, config, seed)


def sorted_slopes(weights: LayerWeights) -> LayerWeights:
    """From steep to flat, which is not the order of five heads."""
    slope_H = weights.attention.alibi_slope_H
    assert slope_H is not None
    sloped = slope_H.sort(descending=True).values
    return replace(weights, attention=replace(weights.attention, alibi_slope_H=sloped))


def slopes_to_eight(weights: LayerWeights) -> LayerWeights:
    """As transformers has them, whatever the config says."""
    slope_H = weights.attention.alibi_slope_H
    assert slope_H is not None
    return replace(weights, attention=replace(weights.attention, alibi_slope_H=slope_H**0.5))


def unclipped(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, qkv_clip=None)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


WRONG: dict[str, dict[str, Any]] = {
    "slopes sorted": {"on_layer": sorted_slopes},
    "slopes to 8": {"on_layer": slopes_to_eight},
    "not clipped": {"on_config": unclipped},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    attention = {"alibi_bias_max": 16, "clip_qkv": 0.5}
    config = MptConfig(attn_config=attention, d_model=15, n_heads=5, n_layers=2, max_seq_len=32, vocab_size=20)
    catches(MptForCausalLM, config, WRONG)


def test_published_config_reads_as_transformers_reads_it() -> None:
    """MPT-7B-StoryWriter's, whose `clip_qkv` is the whole number 6, which transformers no longer takes."""
    older: dict[str, Any] = published("mpt-7b-storywriter")
    reads_alike(MptConfig, older)


SIZES = {"model_type": "mpt", "d_model": 6, "n_heads": 2, "n_layers": 1, "max_seq_len": 8, "vocab_size": 5}


@pytest.mark.parametrize(
    ("outer", "inner", "name"),
    [
        ({}, {"alibi": False}, "attn_config.alibi is false"),
        ({}, {"attn_type": "multiquery_attention"}, "attn_config.attn_type is"),
        ({}, {"prefix_lm": True}, "attn_config.prefix_lm is true"),
        ({}, {"qk_ln": True}, "attn_config.qk_ln is true"),
        ({}, {"rope": True}, "attn_config.rope is true"),
        ({"logit_scale": "inv_sqrt_d_model"}, {}, "logit_scale is"),
        ({"no_bias": False}, {}, "no_bias is false"),
        ({"norm_type": "rmsnorm"}, {}, "norm_type is"),
    ],
)
def test_what_transformers_passes_over_is_refused(
    tmp_path: Path, outer: dict[str, Any], inner: dict[str, Any], name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"attn_config": inner} | outer))
    (tmp_path / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(ConfigError, match=name):
        open_model(str(tmp_path))
