"""Megatron-LM's GPT beside transformers' GPT-2, whose weights are written as Megatron keeps them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config

from twinfer.checkpoint import open_model
from twinfer.spec.errors import ConfigError, WeightError
from twinfer.spec.weights import EmbeddingWeights, LayerWeights

from .examples import drawn

MODULES = {"attn.c_proj": "dense", "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"}
NORMS = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}


def merged(stacked: Tensor, heads: int, version: float) -> Tensor:
    """Rows of queries, keys and values in turn, in the order of a checkpoint's version."""
    third = len(stacked) // 3
    size = third // heads

    def row(kind: int, head: int, element: int) -> Tensor:
        return stacked[kind * third + head * size + element]

    kinds, elements = range(3), range(size)
    if version == 0:
        rows = [row(kind, head, element) for kind in kinds for head in range(heads) for element in elements]
    elif version == 1:
        rows = [row(kind, head, element) for head in range(heads) for element in elements for kind in kinds]
    else:
        rows = [row(kind, head, element) for head in range(heads) for kind in kinds for element in elements]
    return torch.stack(rows)


USUAL = {
    "version": 3.0,
    "stack": "encoder",
    "attention": "self_attention",
    "repeats_head": False,
    "activation": {},
    "experts": {},
}


class GPT2LMHeadModel(transformers.GPT2LMHeadModel):  # type: ignore[misc]
    """GPT-2 that saves itself as Megatron does, in one of the forms that it had."""

    def __init__(self, config: GPT2Config, form: Mapping[str, Any] = MappingProxyType({})) -> None:
        super().__init__(config)
        self.form = {**USUAL, **form}

    def save_pretrained(self, folder: str, **_: Any) -> None:
        config, theirs = self.config, self.state_dict()
        form, stack, attention = self.form, self.form["stack"], self.form["attention"]
        own = {
            "language_model.embedding.word_embeddings.weight": theirs["transformer.wte.weight"],
            "language_model.embedding.position_embeddings.weight": theirs["transformer.wpe.weight"],
        }
        if form["repeats_head"]:
            own["word_embeddings_for_head.weight"] = theirs["transformer.wte.weight"].clone()
        for part in ("weight", "bias"):
            own[f"language_model.{stack}.final_layernorm.{part}"] = theirs[f"transformer.ln_f.{part}"]
        for index in range(config.n_layer):
            there, here = f"transformer.h.{index}.", f"language_model.{stack}.layers.{index}."
            for part in ("weight", "bias"):
                stacked = theirs[f"{there}attn.c_attn.{part}"].movedim(-1, 0)
                own[f"{here}{attention}.query_key_value.{part}"] = merged(stacked, config.n_head, form["version"])
                for gpt2, name in MODULES.items():
                    if f"{there}{gpt2}.{part}" not in theirs:
                        continue
                    kept = f"{attention}.{name}" if name == "dense" else name
                    own[f"{here}{kept}.{part}"] = theirs[f"{there}{gpt2}.{part}"].movedim(-1, 0)
                for gpt2, name in NORMS.items():
                    own[f"{here}{name}.{part}"] = theirs[f"{there}{gpt2}.{part}"]
            own |= {
                f"{here}{name.removeprefix(there)}": each
                for name, each in theirs.items()
                if name.startswith(f"{there}mlp.") and not name.startswith((f"{there}mlp.c_fc", f"{there}mlp.c_proj"))
            }
        save_file({name: each.contiguous() for name, each in own.items()}, Path(folder) / "model.safetensors")
        arguments = {
            "model_type": "megatron_gpt",
            "checkpoint_version": form["version"],
            "num_layers": config.n_layer,
            "hidden_size": config.n_embd,
            "ffn_hidden_size": config.n_inner,
            "num_attention_heads": config.n_head,
            "kv_channels": config.n_embd // config.n_head,
            "max_position_embeddings": config.n_positions,
            "padded_vocab_size": config.vocab_size,
            "vocab_size": config.vocab_size - 1,
            "make_vocab_size_divisible_by": 1,
            "layernorm_epsilon": config.layer_norm_epsilon,
            **form["activation"],
            "apply_query_key_layer_scaling": True,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.1,
            "fp16": True,
            **form["experts"],
        }
        (Path(folder) / "config.json").write_text(json.dumps(arguments))


@st.composite
def models(draw: st.DrawFn) -> tuple[GPT2Config, dict[str, Any]]:
    heads = draw(st.integers(1, 4))
    activations = {
        "gelu_new": [{}, {"bias_gelu_fusion": True}, {"bias_gelu_fusion": False, "openai_gelu": True}],
        "gelu": [{"bias_gelu_fusion": False}, {"bias_gelu_fusion": False, "openai_gelu": False}],
    }
    activation = draw(st.sampled_from(list(activations)))
    form = {
        "version": draw(st.sampled_from([0, 1.0, 2.0, 3.0])),
        "stack": draw(st.sampled_from(["transformer", "encoder"])),
        "attention": draw(st.sampled_from(["attention", "self_attention"])),
        "repeats_head": draw(st.booleans()),
        "activation": draw(st.sampled_from(activations[activation])),
    }
    config = GPT2Config(
        vocab_size=draw(st.integers(3, 40)),
        n_positions=draw(st.integers(16, 64)),
        n_embd=heads * draw(st.integers(-(-3 // heads), 9)),
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_inner=draw(st.one_of(st.none(), st.integers(1, 20))),
        activation_function=activation,
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.25])),
    )
    return config, form


@drawn(6)
@given(model=models(), seed=st.integers(0, 2**31))
def test_megatron_gpt(model: tuple[GPT2Config, dict[str, Any]], seed: int, agrees: Callable[..., None]) -> None:
    config, form = model
    agrees(partial(GPT2LMHeadModel, form=form), config, seed)


SIZES: dict[str, Any] = {"vocab_size": 20, "n_positions": 32, "n_embd": 12, "n_layer": 2, "n_head": 3}


@pytest.mark.parametrize("version", [0, 1.0, 2.0])
@pytest.mark.parametrize("said", [0, 1, 2, 3])
def test_every_version_is_another_order(version: float, said: int, tmp_path: Path) -> None:
    """A checkpoint that says another version than it has is another model."""
    GPT2LMHeadModel(GPT2Config(**SIZES), {"version": version}).save_pretrained(str(tmp_path))
    right = open_model(str(tmp_path)).source.layer(0).attention.query.weight_NI
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint_version": said}))
    found = open_model(str(tmp_path)).source.layer(0).attention.query.weight_NI
    assert torch.equal(found, right) == (min(said, 2) == version)


def positions_late(weights: EmbeddingWeights) -> EmbeddingWeights:
    assert weights.position_PM is not None
    return replace(weights, position_PM=weights.position_PM.roll(-1, 0))


def norms_swapped(weights: LayerWeights) -> LayerWeights:
    return replace(weights, attention_norm=weights.mlp_norm, mlp_norm=weights.attention_norm)


def elements_by_turns(weights: LayerWeights) -> LayerWeights:
    """Elements of the three heads of four in turn, as version 1 would have them if it kept heads last."""
    query = weights.attention.query
    turned = query.weight_NI.unflatten(0, (4, 3)).transpose(0, 1).flatten(0, 1)
    return replace(weights, attention=replace(weights.attention, query=replace(query, weight_NI=turned)))


WRONG: dict[str, dict[str, Any]] = {
    "positions one late": {"on_embedding": positions_late},
    "norms swapped": {"on_layer": norms_swapped},
    "elements by turns": {"on_layer": elements_by_turns},
}


def test_wrong_mappings_are_seen(catches: Callable[..., None]) -> None:
    catches(partial(GPT2LMHeadModel, form={"version": 1.0}), GPT2Config(**SIZES), WRONG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_version": None}, "checkpoint_version is null; it must be 0, 1, 2 or 3"),
        ({"checkpoint_version": [2]}, "checkpoint_version is "),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is true"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p is true"),
        ({"normalization": "RMSNorm"}, "normalization is"),
        ({"swiglu": True}, "swiglu is true"),
        ({"group_query_attention": True}, "group_query_attention is true"),
        ({"kv_channels": 2}, "kv_channels is 2"),
        ({"untie_embeddings_and_output_weights": True}, "untie_embeddings_and_output_weights is true"),
    ],
)
def test_arguments_that_are_not_computed_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    GPT2LMHeadModel(GPT2Config(**SIZES)).save_pretrained(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        open_model(str(tmp_path))


def test_a_repeated_table_that_differs_is_refused(tmp_path: Path) -> None:
    """The last pipeline stage keeps a copy of the table; the head is tied, so it must be one."""
    GPT2LMHeadModel(GPT2Config(**SIZES), {"repeats_head": True}).save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    kept = load_file(path)
    kept["word_embeddings_for_head.weight"] += 1
    save_file(kept, path)
    with pytest.raises(WeightError, match=r"word_embeddings_for_head\.weight differs"):
        open_model(str(tmp_path))
