"""CLIP's text tower beside transformers, alone, under its projection, and beside the vision tower."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
)

from twinfer.checkpoint import open_model
from twinfer.spec.config import Activation, ModelConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import LayerWeights

from .examples import drawn

VISION = {
    "hidden_size": 6,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 4,
    "patch_size": 2,
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(st.integers(1, 4))
    return {
        "vocab_size": draw(st.integers(3, 40)),
        "hidden_size": heads * draw(st.integers(1 if heads > 2 else 3, 9)),
        "intermediate_size": draw(st.integers(1, 20)),
        "projection_dim": draw(st.integers(1, 9)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "max_position_embeddings": draw(st.integers(11, 40)),
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu", "relu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 0.25])),
        "eos_token_id": draw(st.integers(0, 2)),
    }


@drawn(6)
@given(config=configs(), kind=st.sampled_from([CLIPTextModel, CLIPTextModelWithProjection]), seed=st.integers(0, 2**31))
def test_text_tower(
    config: dict[str, Any], kind: type[PreTrainedModel], seed: int, encodes: Callable[..., None]
) -> None:
    encodes(kind, CLIPTextConfig(**config), seed)


@drawn(4)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_beside_the_vision_tower(config: dict[str, Any], seed: int, encodes: Callable[..., None]) -> None:
    encodes(CLIPModel, CLIPConfig(text_config=config, vision_config=VISION, projection_dim=3), seed)


def seeing_later_tokens(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, causal=False)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def exact_gelu(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, mlp=replace(layer.mlp, activation=Activation.GELU)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)


WRONG: dict[str, dict[str, Any]] = {
    "seeing later tokens": {"on_config": seeing_later_tokens},
    "exact GELU": {"on_config": exact_gelu},
    "norms swapped": {"on_layer": norms_swapped},
}
SMALL = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7}


def test_wrong_mappings_are_seen(catches_encoding: Callable[..., None]) -> None:
    catches_encoding(CLIPTextModel, CLIPTextConfig(**SMALL, eos_token_id=2), WRONG)


def saved(folder: Path, **changes: Any) -> Path:
    """A whole CLIP, with other fields in its config.json."""
    CLIPModel(CLIPConfig(text_config=SMALL, vision_config=VISION)).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_older_configs_name_the_text_towers_fields_twice(tmp_path: Path) -> None:
    same, null, other = (tmp_path / name for name in ("same", "null", "other"))
    for folder, older in ((same, SMALL), (null, None)):
        config = open_model(str(saved(folder, text_config_dict=older, vision_config_dict=VISION))).config
        assert (config.hidden, len(config.layers)) == (12, 2)
    with pytest.raises(ConfigError, match=r"text_config_dict.hidden_size is 13; it must be as in text_config"):
        open_model(str(saved(other, text_config_dict=SMALL | {"hidden_size": 13})))


def test_a_field_of_the_text_tower_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text_config.twist is 3"):
        open_model(str(saved(tmp_path, text_config={**SMALL, "twist": 3})))


def test_tensors_of_no_tower_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from twinfer.spec.errors import WeightError

    file = saved(tmp_path) / "model.safetensors"
    save_file(load_file(file) | {"audio_model.weight": torch.ones(2)}, file)
    with pytest.raises(WeightError, match=r"audio_model\.weight"):
        open_model(str(tmp_path))
