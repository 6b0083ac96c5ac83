"""RoBERTa and its two namesakes beside transformers, over everything that their config class lets vary.

transformers finds positions by counting the tokens that are not padding, so a padding token inside a text shifts those
that follow. Here no position depends on a token, and texts are drawn without that token.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CamembertConfig,
    CamembertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaModel,
)

from twinfer.checkpoint import open_model
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import ModelConfig
from twinfer.spec.errors import ConfigError
from twinfer.spec.weights import EmbeddingWeights

from .examples import drawn

CLASSES: tuple[tuple[type[PreTrainedModel], type[PreTrainedConfig]], ...] = (
    (RobertaModel, RobertaConfig),
    (RobertaForMaskedLM, RobertaConfig),
    (XLMRobertaModel, XLMRobertaConfig),
    (XLMRobertaForMaskedLM, XLMRobertaConfig),
    (CamembertForMaskedLM, CamembertConfig),
)


@st.composite
def configs(draw: st.DrawFn) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    heads = draw(st.integers(1, 4))
    kind, config = draw(st.sampled_from(CLASSES))
    padding = draw(st.integers(0, 3))
    return kind, config(
        vocab_size=draw(st.integers(5, 40)),
        hidden_size=heads * draw(st.integers(1 if heads > 2 else 3, 9)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 20)),
        hidden_act=draw(st.sampled_from(["gelu", "relu", "gelu_new"])),
        max_position_embeddings=padding + 1 + draw(st.integers(11, 30)),
        type_vocab_size=draw(st.integers(1, 2)),
        layer_norm_eps=draw(st.sampled_from([1e-12, 1e-5, 0.25])),
        pad_token_id=padding,
    )


@drawn(6)
@given(model=configs(), seed=st.integers(0, 2**31))
def test_roberta(
    model: tuple[type[PreTrainedModel], PreTrainedConfig], seed: int, encodes: Callable[..., None]
) -> None:
    kind, config = model
    encodes(kind, config, seed, without=config.pad_token_id)


def positions_from_nought(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.position_PM is not None
    return replace(weights, position_PM=weights.position_PM.roll(2, 0))


def scaled_by_size(config: ModelConfig) -> ModelConfig:
    layers = [replace(layer, attention=replace(layer.attention, scale=0.25)) for layer in config.layers]
    return replace(config, layers=tuple(layers))


WRONG: dict[str, dict[str, Any]] = {
    "positions from 0": {"on_embedding": positions_from_nought},
    "scaled by the head size": {"on_config": scaled_by_size},
}
SMALL = {"vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 7}


def test_wrong_mappings_are_seen(catches_encoding: Callable[..., None]) -> None:
    catches_encoding(RobertaModel, RobertaConfig(**SMALL), WRONG, without=1)


def test_the_context_is_what_the_table_leaves(tmp_path: Path) -> None:
    """Tokens 0 to 511 of a table of 514 rows; and the padding token moves nobody."""
    RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=14)).save_pretrained(tmp_path)
    source = open_model(str(tmp_path)).source
    assert source.config.context == 12
    path = ReferencePath(source)
    (plain_TM,) = path.encode([torch.tensor([3, 4, 5])])
    (padded_TM,) = path.encode([torch.tensor([3, 1, 5])])
    assert not torch.equal(plain_TM, padded_TM)


def test_a_table_too_short_to_begin_is_refused(tmp_path: Path) -> None:
    RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=4, pad_token_id=3)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="max_position_embeddings is 4; it must be above 4"):
        open_model(str(tmp_path))
