"""Folders and files of models with experts: written and opened again, shared out, and refused where they do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, MixtralConfig, MixtralForCausalLM

from twinfer.checkpoint import open_model
from twinfer.checkpoint.builtin import INCLUDED
from twinfer.converting import convert
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Storage
from twinfer.spec.errors import CheckpointError, ConfigError, WeightError

from ..compiled.moe_models import draw_moe_config
from ..shards import assert_shards_join
from .test_convert import all_tensors, checkpoint_of, quiet

BARE = "layers.1.block_sparse_moe.experts.{}.w1.weight"
EXPERT = f"model.{BARE}"


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_converted_mixture_is_the_same_bit_by_bit(storage: Storage, seed: int, tmp_path: Path) -> None:
    """And the shares of all ranks together are the model."""
    source = RandomSource(draw_moe_config(RandomPicker(seed)), seed)
    convert(checkpoint_of(source), tmp_path / "out", storage, quiet)
    opened = open_model(str(tmp_path / "out"))
    assert opened.config == source.config
    ours, theirs = (
        dict(all_tensors(ReferencePath(each, storage=storage, compute=torch.float64)))
        for each in (opened.source, source)
    )
    assert ours.keys() == theirs.keys()
    assert all(same_bits(tensor, theirs[name]) for name, tensor in ours.items())
    assert_shards_join(opened.source, storage)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral as it is published, a tensor for each expert."""
    folder = tmp_path_factory.mktemp("mixtral")
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **experts, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(
        folder
    )
    assert EXPERT.format(3) in load_file(folder / "model.safetensors")
    return folder


def _with_one_more(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT.format(4)] = tensors[EXPERT.format(3)].clone()


def _with_a_longer_one(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT.format(2)] = torch.zeros(7, 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(EXPERT.format(2)), rf"lacks {BARE.format(2)}, which"),
        (lambda tensors: tensors.pop(EXPERT.format(0)), rf"lacks {BARE.format(0)}, which"),
        (_with_one_more, rf"holds {EXPERT.format(4)}, which .* does not have"),
        (_with_a_longer_one, rf"{EXPERT.format(2)} has shape \[7, 8\]; by its config it must be \[6, 8\]"),
    ],
    ids=["lacks one", "lacks the first", "one too many", "unequal shape"],
)
def test_experts_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], Any],
    says: str,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By layer and expert, before a tensor is read."""
    tensors = load_file(published / "model.safetensors")
    change(tensors)
    _write(published, tmp_path, {})
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr("twinfer.checkpoint.expert_reading.read_experts", None)
    with pytest.raises(WeightError, match=says):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda each: each[:7], r"BF16 of shape \[7, .*\(7 experts\); .* must be BF16 of shape \[8, .*\(8 experts\)"),
        (lambda each: torch.cat([each, each[:1]]), r"BF16 of shape \[9, .*\(9 experts\); .*\(8 experts\)"),
    ],
    ids=["lacks one", "one too many"],
)
def test_a_folder_of_ours_with_other_experts_is_refused(
    change: Callable[[Tensor], Tensor], says: str, tmp_path: Path
) -> None:
    """By layer and number of experts."""
    folder = tmp_path / "tiny-moe"
    shutil.copytree(INCLUDED["tiny-moe"], folder)
    path = folder / "layer-00003.safetensors"
    tensors = load_file(path)
    save_file({name: change(each) if "experts" in name else each for name, each in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=rf"layer-00003\.safetensors: mlp\.experts\.up\.weight_ENI is {says}"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_experts_per_tok": 5}, "top_k is 5; .*which are 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(
    fields: dict[str, Any], says: str, published: Path, tmp_path: Path
) -> None:
    _write(published, tmp_path, fields)
    with pytest.raises(ConfigError, match=says):
        open_model(str(tmp_path))


def test_glm_s_layer_that_guesses_further_ahead_is_left_out(tmp_path: Path) -> None:
    """Files hold it behind the others, under the next number; one that the config does not speak of is refused."""
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "head_dim": 4}
    few = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 4}
    config = Glm4MoeConfig(**sizes, **few, num_attention_heads=2, num_key_value_heads=1)
    Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"model.layers.2.eh_proj.weight": torch.zeros(8, 16), "model.layers.2.enorm.weight": torch.zeros(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 1}))
    assert len(open_model(str(tmp_path)).config.layers) == 2
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_nextn_predict_layers": 0}))
    with pytest.raises(WeightError, match=r"holds model\.layers\.2\.eh_proj\.weight"):
        open_model(str(tmp_path))


def _write(published: Path, folder: Path, fields: dict[str, Any]) -> None:
    """Copy config and weights, with these fields of the config otherwise."""
    config = json.loads((published / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
