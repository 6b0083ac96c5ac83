"""BERT beside transformers, over everything that its config class lets vary, and as published files have it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertModel,
    PreTrainedModel,
)

from twinfer.checkpoint import open_model
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import ModelConfig, NormPlacement
from twinfer.spec.errors import CheckpointError, ConfigError
from twinfer.spec.weights import EmbeddingWeights, LayerWeights

from .examples import drawn


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, Any]:
    """What BERT and its relatives let vary."""
    heads = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(4, 40)),
        "hidden_size": heads * draw(st.integers(1 if heads > 2 else 3, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 20)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "gelu_new", "silu"])),
        "max_position_embeddings": draw(st.integers(16, 40)),
        "type_vocab_size": draw(st.integers(1, 3)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-5, 0.25])),
    }


CLASSES = (BertModel, BertForMaskedLM, BertForPreTraining, BertForNextSentencePrediction)


@drawn(6)
@given(config=sizes(), kind=st.sampled_from(CLASSES), seed=st.integers(0, 2**31))
def test_bert(config: dict[str, Any], kind: type[PreTrainedModel], seed: int, encodes: Callable[..., None]) -> None:
    encodes(kind, BertConfig(**config), seed)


def causal(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, causal=True)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def normed_before(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, norm_placement=NormPlacement.PRE_NORM) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def with_inner_norms(weights: LayerWeights) -> LayerWeights:
    return replace(
        weights,
        attention_norm=weights.attention_output_norm,
        mlp_norm=weights.mlp_output_norm,
        attention_output_norm=None,
        mlp_output_norm=None,
    )


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(
        weights, attention_output_norm=weights.mlp_output_norm, mlp_output_norm=weights.attention_output_norm
    )


def types_reversed(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.type_YM is not None
    return replace(weights, type_YM=weights.type_YM.flip(0))


WRONG: dict[str, dict[str, Any]] = {
    "causal": {"on_config": causal},
    "normed before": {"on_config": normed_before, "on_layer": with_inner_norms},
    "norms swapped": {"on_layer": norms_swapped},
    "types reversed": {"on_embedding": types_reversed},
}
SMALL = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7}


def test_wrong_mappings_are_seen(catches_encoding: Callable[..., None]) -> None:
    catches_encoding(BertModel, BertConfig(**SMALL), WRONG)


def test_files_from_before_safetensors_are_read(tmp_path: Path) -> None:
    """Norms by their older names, positions kept as a buffer, fields that the library no longer writes."""
    model = BertForPreTraining(BertConfig(**SMALL, max_position_embeddings=16))
    model.save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "old")
    named = load_file(tmp_path / "new" / "model.safetensors")
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): each
        for name, each in named.items()
    }
    assert older.keys() != named.keys()
    older["bert.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(older, tmp_path / "old" / "model.safetensors")
    path = tmp_path / "old" / "config.json"
    fields = json.loads(path.read_text()) | {
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
        "pooler_type": "first_token_transform",
        "pooler_fc_size": 768,
        "directionality": "bidi",
        "output_past": True,
        "pruned_heads": {},
    }
    path.write_text(json.dumps(fields))
    (new_TM,), (old_TM,) = (
        ReferencePath(open_model(str(tmp_path / name)).source).encode([torch.arange(9)]) for name in ("new", "old")
    )
    assert torch.equal(new_TM, old_TM)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"is_decoder": True}, ConfigError, "is_decoder is true; it must be false"),
        ({"position_embedding_type": "relative_key"}, ConfigError, 'position_embedding_type is "relative_key"'),
        ({"architectures": ["BertLMHeadModel"]}, CheckpointError, "BertForMaskedLM"),
    ],
)
def test_what_is_no_plain_encoder_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[CheckpointError], says: str
) -> None:
    BertModel(BertConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(error, match=says):
        open_model(str(tmp_path))
