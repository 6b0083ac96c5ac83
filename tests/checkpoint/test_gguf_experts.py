"""Experts in GGUF files: every form and format they are kept in, and files in which they do not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from gguf.quants import dequantize, quantize

from twinfer.checkpoint import open_model
from twinfer.oracle.trial import same_bits
from twinfer.spec.errors import ConfigError, WeightError
from twinfer.spec.weights import ExpertWeights, MoeWeights, WeightSource, tensors

from ..families.conftest import assert_same_model
from ..shards import assert_shards_join
from .gguf_converter import Config, Rows
from .gguf_kind import Kind
from .gguf_kinds_moe import MOE_KINDS, one_map_a_tensor
from .gguf_kinds_sigmoid import SIGMOID_KINDS
from .test_gguf_architectures import Written, named_parameters

KINDS, GATING = gguf.GGMLQuantizationType, gguf.ExpertGatingFuncType
QWEN3 = next(kind for kind in MOE_KINDS if kind.architecture == "qwen3moe")
GLM = next(kind for kind in SIGMOID_KINDS if kind.architecture == "glm4moe")
FOLDERS = [kind for kind in (*MOE_KINDS, *SIGMOID_KINDS) if kind.model is not hf.DbrxForCausalLM]
"""Without models whose epsilon is no float32, which is how these files keep it."""
WIDE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 4}
"""Experts of 32 by 64, whole blocks of most formats."""


def usual(kind: Kind, **fields: Any) -> Config:
    exact = {name: 2.0**-17 for name in ("rms_norm_eps",) if name in kind.options}
    sizes = {"vocabulary": 20, "layers": 2, "kv_heads": 2, "group": 2, "size": 16, "width": 32}
    return kind.made(sizes, exact | kind.chosen | fields)


Held = dict[str, tuple[Rows, KINDS]]


def write(
    path: Path,
    kind: Kind,
    config: Config,
    *,
    form: KINDS = KINDS.F32,
    change: Callable[[Held], Any] = lambda held: None,
    keys: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Written:
    """A model's file, its experts in a format, with some tensors and keys changed."""
    written = Written(kind, config, 1, path)
    held = {
        name: (np.ascontiguousarray(kind.rows(name, values, config)), form if "_exps" in name else KINDS.F32)
        for name, values in written.tensors().items()
    }
    change(held)
    writer = gguf.GGUFWriter(path, kind.architecture)
    kind.keys(writer, config)
    keys(writer)
    for name, (values, how) in held.items():
        writer.add_tensor(name, quantize(values, how), raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def experts_of(source: WeightSource, index: int = 1) -> ExpertWeights:
    mlp = source.layer(index).mlp
    assert isinstance(mlp, MoeWeights)
    return mlp.experts


@pytest.mark.parametrize("kind", FOLDERS, ids=[kind.architecture for kind in FOLDERS])
def test_a_file_is_the_folder_it_was_converted_from(kind: Kind, tmp_path: Path) -> None:
    """Config and weights, bit by bit."""
    written = Written(kind, usual(kind, size=8), 1, tmp_path / "m.gguf")
    written.model.float().save_pretrained(tmp_path / "folder")
    assert_same_model(open_model(str(written.path)).source, open_model(str(tmp_path / "folder")).source)


def one_by_one(held: Held) -> None:
    """As converters wrote experts before 2024."""
    for name in [name for name in held if "_exps" in name]:
        values, form = held.pop(name)
        for expert, each in enumerate(values):
            held[name.replace("_exps", f".{expert}")] = np.ascontiguousarray(each), form


def gate_with_up(held: Held) -> None:
    for name in [name for name in held if "ffn_gate_exps" in name]:
        (gate, form), (up, _) = held.pop(name), held.pop(name.replace("gate", "up"))
        held[name.replace("gate_exps", "gate_up_exps")] = np.concatenate([gate, up], axis=1), form


@pytest.mark.parametrize("change", [one_by_one, gate_with_up])
def test_every_form_of_experts_holds_the_same_weights(change: Callable[[Held], None], tmp_path: Path) -> None:
    """Also what each rank reads of it."""
    config = usual(QWEN3)
    sources = []
    for name, how in (("stacked", lambda held: None), ("other", change)):
        write(tmp_path / f"{name}.gguf", QWEN3, config, change=how)
        sources.append(open_model(str(tmp_path / f"{name}.gguf")).source)
    assert_same_model(*sources)
    assert_shards_join(sources[1])


@pytest.mark.parametrize("form", [KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_1, KINDS.Q5_0, KINDS.MXFP4])
def test_quantized_experts_are_read_as_the_library_reads_them(form: KINDS, tmp_path: Path) -> None:
    """Each expert's matrix by itself, whole and in what a rank holds of it."""
    config = usual(QWEN3, **WIDE)
    written = write(tmp_path / "m.gguf", QWEN3, config, form=form)
    source = open_model(str(written.path)).source
    found = one_map_a_tensor(named_parameters(written.model), config)
    for name, read in tensors(experts_of(source)):
        theirs = found[f"model.layers.1.mlp.experts.{name.split('.')[0]}_proj.weight"]
        each = [torch.from_numpy(dequantize(quantize(matrix, form), form)) for matrix in np.ascontiguousarray(theirs)]
        assert same_bits(read, torch.stack(each)), name
    assert assert_shards_join(source) == [1, 2, 4]


def test_layers_that_guess_further_ahead_are_left_out(tmp_path: Path) -> None:
    """GLM's files count them among the layers."""
    config = usual(GLM)
    write(tmp_path / "bare.gguf", GLM, config)

    def further(held: Held) -> None:
        own = {name: values for name, values in held.items() if name.startswith("blk.1.")}
        held |= {name.replace("blk.1.", "blk.2."): values for name, values in own.items()}
        held["blk.2.nextn.eh_proj.weight"] = np.zeros((3, 5), np.float32), KINDS.F32

    def counted(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(3)
        writer.add_nextn_predict_layers(1)

    write(tmp_path / "m.gguf", GLM, config, change=further, keys=counted)
    assert_same_model(*(open_model(str(tmp_path / f"{name}.gguf")).source for name in ("m", "bare")))


def test_keys_say_how_weights_are_made(tmp_path: Path) -> None:
    """Also where other readers take no notice of them."""

    def said(writer: gguf.GGUFWriter) -> None:
        writer.add_expert_weights_norm(False)
        writer.add_expert_weights_scale(2.5)

    write(tmp_path / "m.gguf", QWEN3, usual(QWEN3), keys=said)
    mlp = open_model(str(tmp_path / "m.gguf")).config.layers[0].mlp
    assert (mlp.router.renormalize, mlp.router.scale) == (False, 2.5)  # type: ignore[union-attr]


def without(name: str) -> Callable[[Held], Any]:
    return lambda held: held.pop(name)


def one_fewer(held: Held) -> None:
    values, form = held["blk.1.ffn_up_exps.weight"]
    held["blk.1.ffn_up_exps.weight"] = values[:-1], form


def one_more(held: Held) -> None:
    values, form = held["blk.1.ffn_down_exps.weight"]
    held["blk.1.ffn_down_exps.weight"] = np.concatenate([values, values[:1]]), form


def narrower(held: Held) -> None:
    values, form = held["blk.0.ffn_gate_exps.weight"]
    held["blk.0.ffn_gate_exps.weight"] = np.ascontiguousarray(values[:, :-1]), form


def apart(change: Callable[[Held], Any]) -> Callable[[Held], Any]:
    """The same of a file with a tensor for each expert."""

    def both(held: Held) -> None:
        one_by_one(held)
        change(held)

    return both


def a_seventh(held: Held) -> None:
    held["blk.0.ffn_up.6.weight"] = held["blk.0.ffn_up.5.weight"]


def a_longer(held: Held) -> None:
    held["blk.0.ffn_up.2.weight"] = np.zeros((9, 64), np.float32), KINDS.F32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("blk.1.ffn_up_exps.weight"), r"lacks blk\.1\.ffn_up_exps\.weight, which"),
        (without("blk.0.ffn_gate_inp.weight"), r"lacks blk\.0\.ffn_gate_inp\.weight, which"),
        (one_fewer, r"blk\.1\.ffn_up_exps\.weight holds 5 experts; by its config it must hold 6"),
        (one_more, r"blk\.1\.ffn_down_exps\.weight holds 7 experts; by its config it must hold 6"),
        (narrower, r"blk\.0\.ffn_gate_exps\.weight has shape \[6, 7, 64\]; by its config it must be \[6, 8, 64\]"),
        (apart(without("blk.1.ffn_gate.3.weight")), r"lacks blk\.1\.ffn_gate\.3\.weight, which"),
        (apart(a_seventh), r"holds blk\.0\.ffn_up\.6\.weight, which .* does not have"),
        (apart(a_longer), r"blk\.0\.ffn_up\.2\.weight has shape \[9, 64\]; by its config it must be \[8, 64\]"),
    ],
)
def test_experts_that_do_not_fit_are_named(change: Callable[[Held], Any], says: str, tmp_path: Path) -> None:
    """By layer and expert, or how many there are."""
    write(tmp_path / "m.gguf", QWEN3, usual(QWEN3), change=change)
    with pytest.raises(WeightError, match=says):
        open_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("kind", "keys", "says"),
    [
        (QWEN3, lambda writer: writer.add_expert_used_count(7), "top_k is 7; .*which are 6"),
        (QWEN3, lambda writer: writer.add_expert_count(0), "qwen3moe.expert_count is 0"),
        (QWEN3, lambda writer: writer.add_expert_group_count(4), "groups is 4; it must be a divisor of experts"),
        (
            QWEN3,
            lambda w: w.add_expert_gating_func(GATING.SIGMOID),
            "expert_gating_func is 2; it must be 1, the softmax",
        ),
        (
            GLM,
            lambda w: w.add_expert_gating_func(GATING.SOFTMAX),
            "expert_gating_func is 1; it must be 2, the sigmoid",
        ),
        (QWEN3, lambda writer: writer.add_expert_group_scale(0.5), "expert_group_scale is 0.5; this version does not"),
        (QWEN3, lambda w: w.add_expert_shared_count(1), "expert_shared_count is 1; this version does not know"),
        (QWEN3, lambda w: w.add_leading_dense_block_count(1), "leading_dense_block_count is 1; this version does not"),
        (QWEN3, lambda w: w.add_interleave_moe_layer_step(2), "interleave_moe_layer_step is 2; this version does not"),
    ],
)
def test_keys_that_make_no_router_are_refused(
    kind: Kind, keys: Callable[[gguf.GGUFWriter], None], says: str, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", kind, usual(kind), keys=keys)
    with pytest.raises(ConfigError, match=says):
        open_model(str(tmp_path / "m.gguf"))


def test_a_sigmoid_s_weights_must_be_told(tmp_path: Path) -> None:
    """Whether they are renormalized: readers and the models' own code take different values where no key says it."""

    def silent(writer: gguf.GGUFWriter, config: Config) -> None:
        GLM.keys(writer, config)
        del writer.kv_data[0]["glm4moe.expert_weights_norm"]

    write(tmp_path / "m.gguf", replace(GLM, keys=silent), usual(GLM))
    with pytest.raises(ConfigError, match="expert_weights_norm is missing; it must be true or false"):
        open_model(str(tmp_path / "m.gguf"))
