"""Folders of the twinfer form that were damaged are named when they are opened."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinfer.checkpoint import open_model
from twinfer.converting import convert
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage
from twinfer.spec.errors import TwinferError

from .test_convert import checkpoint_of, model, quiet, words


def cut_short(folder: Path) -> None:
    path = folder / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def edit(folder: Path, name: str, value: Any) -> None:
    values = json.loads((folder / "twinfer.json").read_text())
    (folder / "twinfer.json").write_text(json.dumps({**values, name: value}))


def one_layer_less(folder: Path) -> None:
    config = json.loads((folder / "twinfer.json").read_text())["config"]
    edit(folder, "config", {**config, "layers": config["layers"][:-1]})


def change_layer(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "layer-00000.safetensors"
    save_file(change(load_file(path)), path)


UP = "mlp.up.weight_NI"


def up_as(change: Callable[[Tensor], Tensor], name: str = UP) -> Callable[[Path], None]:
    return lambda folder: change_layer(folder, lambda tensors: tensors | {name: change(tensors[name])})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut_short, "layer-00000.safetensors is truncated or corrupt"),
    "a layer gone": (
        lambda folder: (folder / "layer-00000.safetensors").unlink(),
        "lacks layer-00000.safetensors; convert the model again",
    ),
    "another part": (
        lambda folder: shutil.copy(folder / "head.safetensors", folder / "layer-00000.safetensors"),
        "layer-00000.safetensors: attention.query.weight_NI is absent; in int8, by its config, it must be I8 of shape",
    ),
    "one layer less": (one_layer_less, "holds layer-00001.safetensors, which its config has no place for"),
    "floats for codes": (up_as(lambda codes: codes + 0.5), "mlp.up.weight_NI is F32 of shape"),
    "codes of another shape": (up_as(lambda codes: codes.flatten()), "mlp.up.weight_NI is I8 of shape"),
    "one peak for all": (up_as(lambda peaks: peaks[:1].clone(), f"{UP}.absmax_N"), "absmax_N is F32 of shape [1]"),
    "no peaks": (
        lambda folder: change_layer(folder, lambda each: {k: v for k, v in each.items() if k != f"{UP}.absmax_N"}),
        "mlp.up.weight_NI.absmax_N is absent; in int8",
    ),
    "peaks of nothing": (
        lambda folder: change_layer(folder, lambda each: each | {"mlp.sideways.absmax_N": torch.ones(1)}),
        "mlp.sideways.absmax_N is F32 of shape [1]; in int8, by its config, it must be absent",
    ),
    "another storage": (lambda folder: edit(folder, "storage", "float32"), "in float32, by its config, it must be F32"),
    "an unknown storage": (lambda folder: edit(folder, "storage", "int3"), 'storage is "int3"; it must be one of'),
    "a newer format": (lambda folder: edit(folder, "format", 2), "format is 2; it must be 1"),
    "no config": (lambda folder: edit(folder, "config", None), "config is null; it must be an object"),
    "an unknown field": (lambda folder: edit(folder, "surprise", 1), "surprise is 1; this version does not know"),
    "no JSON": (
        lambda folder: (folder / "twinfer.json").write_text("{"),
        "twinfer.json is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
        "convert the model again",
    ),
    "end tokens of no vocabulary": (
        lambda folder: edit(folder, "end_tokens", [99999]),
        "end_tokens is [99999]; it must be a list of token ids below the vocabulary's size",
    ),
    "texts of no token": (
        lambda folder: edit(folder, "embedding", {"most_tokens": -5}),
        "EmbeddingRecipe.most_tokens is -5; it must be at least 1",
    ),
    "a tokenizer gone": (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json; convert the"),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json is no tokenizer",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_folders_are_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    """When they are opened, before any weight is read."""
    folder = tmp_path / "out"
    config = model().config
    source = RandomSource(replace(config, layers=config.layers[:1] * 2))
    convert(checkpoint_of(source, tokenizer=words()), folder, Storage.INT8, quiet)
    damage(folder)
    with pytest.raises(TwinferError) as error:
        open_model(str(folder))
    assert message in str(error.value)
