"""GGUF files of every architecture, beside the transformers model that their weights came from.

Files are written as the converter of llama.cpp writes them: its names come from the format's own library, and what it
does to rows and gains is done here step by step. Where transformers can read such a file, it must read the same
weights back.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.bloom import modeling_bloom

from twinfer.checkpoint import open_model
from twinfer.checkpoint.gguf import table as gguf_table
from twinfer.checkpoint.gguf.architectures import ARCHITECTURES
from twinfer.checkpoint.table import QKV, linear
from twinfer.reference.path import ReferencePath
from twinfer.spec.errors import ConfigError, TwinferError, WeightError

from ..families.conftest import AGREEMENT, widened
from ..families.examples import drawn
from ..shards import assert_shards_join
from .gguf_converter import Config, Rows, kept, offset
from .gguf_kind import ROPES, Kind
from .gguf_kinds_gpt import GPT_KINDS
from .gguf_kinds_llama import LLAMA_KINDS
from .gguf_kinds_moe import MOE_KINDS, one_map_a_tensor
from .gguf_kinds_sigmoid import SIGMOID_KINDS

KINDS = [*LLAMA_KINDS, *GPT_KINDS, *MOE_KINDS, *SIGMOID_KINDS]
IDS = [f"{kind.architecture}-{kind.model.__name__}-{index}" for index, kind in enumerate(KINDS)]


@pytest.fixture(autouse=True)
def whole_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM's GELU, of which transformers writes a constant with eight digits."""
    gelu = partial(torch.nn.functional.gelu, approximate="tanh")
    monkeypatch.setattr(modeling_bloom, "bloom_gelu_forward", gelu)


class Written:
    """A transformers model in float64, and the GGUF file that the converter would write of it."""

    def __init__(self, kind: Kind, config: Config, seed: int, path: Path, *, rows: Any = None) -> None:
        self.kind, self.path = kind, path
        with widened():
            extra = {"add_pooling_layer": False} if kind.model is hf.BertModel else {}
            self.model = kind.model(config, **extra).eval()
        self.model.set_attn_implementation("eager")
        if hasattr(self.model, "set_experts_implementation"):
            self.model.set_experts_implementation("eager")  # the grouped products know no float64
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in numbers_of(self.model):
                drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
                exact = parameter.ndim == 1 and kind.rows is offset  # 1 more is a float32 as well
                parameter.copy_((drawn * 2**10).round() / 2**10 if exact else drawn)
        self._write(config, rows or kind.rows)
        vocabulary = config.vocab_size
        self.token_T = torch.randint(vocabulary, (11,), generator=generator)

    def _write(self, config: Config, rows: Callable[[str, Rows, Config], Rows]) -> None:
        writer = gguf.GGUFWriter(self.path, self.kind.architecture)
        self.kind.keys(writer, config)
        for name, values in self.tensors().items():
            writer.add_tensor(name, np.ascontiguousarray(rows(name, values, config)))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def tensors(self) -> dict[str, Rows]:
        """By GGUF name, in the model's own order."""
        config = self.model.config
        (architecture,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.kind.architecture)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        found: dict[str, Rows] = {}
        for name, values in one_map_a_tensor(named_parameters(self.model), config).items():
            bare = name.removeprefix("transformer.") if config.model_type == "bloom" else name
            known = names.get_name(bare, try_suffixes=(".weight", ".bias"))
            assert known is not None, name
            found[known] = values.squeeze() if "token_types" in known else values
        return found

    @cached_property
    def theirs(self) -> Tensor:
        with widened():
            result = self.model(self.token_T[None])
        return result.logits[0] if "logits" in result else result.last_hidden_state[0]

    def ours(self) -> Tensor:
        source = open_model(str(self.path)).source
        assert_shards_join(source)
        path = ReferencePath(source, compute=torch.float64)
        if not source.config.extensible:
            return path.encode([self.token_T])[0]
        return path.extend(path.open(1, 11), [self.token_T], every_position=True)[0]

    def difference(self) -> float:
        """The largest, of all positions, relative to the largest number of its position."""
        return float(((self.ours() - self.theirs).abs().amax(-1) / self.theirs.abs().amax(-1)).max())


def numbers_of(model: hf.PreTrainedModel) -> list[tuple[str, Tensor]]:
    """The parameters, and buffers that files hold as well."""
    held = [pair for pair in model.named_buffers() if pair[0].endswith("e_score_correction_bias")]
    return [*model.named_parameters(), *held]


def named_parameters(model: hf.PreTrainedModel) -> dict[str, Rows]:
    """Once each, norms of single heads stacked, as float32, which is how they were drawn."""
    found: dict[str, Rows] = {}
    stacks: dict[str, list[Rows]] = {}
    for name, parameter in numbers_of(model):
        values = parameter.detach().float().numpy()
        before, norms, _ = name.partition(".norms.")
        if norms:
            stacks.setdefault(f"{before}.weight", []).append(values)
        else:
            found[name] = values
    return found | {name: np.stack(values) for name, values in stacks.items()}


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_files_mean_the_models_they_were_made_from(kind: Kind) -> None:
    """In float64, and what transformers reads of the file, bit by bit."""

    @drawn(3)
    @given(config=kind.drawn(), seed=st.integers(0, 2**31))
    def check(config: Config, seed: int) -> None:
        with TemporaryDirectory() as folder:
            written = Written(kind, config, seed, Path(folder) / "m.gguf")
            difference = written.difference()
            assert difference <= AGREEMENT, f"{difference:.2e}; {config}"
            if kind.read_by_transformers:
                read = load_gguf_checkpoint(written.path, return_tensors=True, model_to_load=written.model)["tensors"]
                for name, values in named_parameters(written.model).items():
                    assert np.array_equal(read[name], values), name

    check()


def seen(written: Written) -> bool:
    """Whether the file is refused, or means another model."""
    try:
        return written.difference() > 1000 * AGREEMENT
    except TwinferError:
        return True


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_wrong_mappings_are_seen(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes of the record, keys before queries where they are one tensor, and what the converter does left out."""
    written = Written(kind, kind.usual(), 1, tmp_path / "m.gguf")
    assert written.difference() <= AGREEMENT
    for changes in kind.wrong:
        with monkeypatch.context() as patch:
            patch.setitem(ARCHITECTURES, kind.architecture, replace(ARCHITECTURES[kind.architecture], **changes))
            assert seen(written), changes
    if "blk.0.attn_qkv.weight" in written.tensors():
        with monkeypatch.context() as patch:
            patch.setattr(gguf_table, "FUSED", linear("attn_qkv", "attention.key", "attention.query", QKV[2]))
            assert seen(written)
    if kind.rows is not kept:
        assert seen(Written(kind, kind.usual(), 1, tmp_path / "bare.gguf", rows=kept))


def test_every_architecture_is_tried() -> None:
    assert {kind.architecture for kind in KINDS} == set(ARCHITECTURES)
    assert set(ARCHITECTURES) <= set(gguf.MODEL_ARCH_NAMES.values())


def edited(path: Path, architecture: str, change: Callable[[gguf.GGUFWriter], None], **options: Any) -> Path:
    """The file of an architecture's usual model, with keys added."""
    kind = next(kind for kind in KINDS if kind.architecture == architecture)

    def keys(writer: gguf.GGUFWriter, config: Config) -> None:
        kind.keys(writer, config)
        change(writer)

    usual = replace(kind, keys=keys, chosen=kind.chosen | options)
    return Written(usual, usual.usual(), 1, path).path


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("qwen2", lambda w: w.add_sliding_window(3), "qwen2.attention.sliding_window is 3; this version does not know"),
        ("llama", lambda w: w.add_rope_dimension_count(4), "llama.rope.dimension_count is 4; it must be 8"),
        ("granite", lambda w: w.add_rope_scaling_finetuned(False), "rope.scaling.finetuned is false; it must be true"),
        ("granite", lambda w: w.add_logit_scale(0.0), "granite.logit_scale is 0.0; it must be a finite number above 0"),
        ("gemma2", lambda w: w.add_rope_freq_base_swa(5.0), "rope.freq_base_swa is 5.0; it must be that of the other"),
        ("gemma2", lambda w: w.add_sliding_window_pattern([True] * 3), "true or false for each of the 2 layers"),
        (
            "cohere2",
            lambda w: w.add_sliding_window(0),
            "attention.sliding_window is 0; it must be a whole number from 1",
        ),
        ("bert", lambda w: w.add_causal_attention(True), "bert.attention.causal is true; it must be false"),
        ("gpt2", lambda w: w.add_causal_attention(False), "gpt2.attention.causal is false; it must be true"),
        ("bloom", lambda w: w.add_max_alibi_bias(4.0), "max_alibi_bias is 4.0; this version does not know"),
        ("qwen3", lambda w: w.add_rope_scaling_attn_factors(1.5), "rope.scaling.attn_factor is 1.5; it must be 1.0"),
        ("qwen3", lambda w: w.add_rope_scaling_yarn_log_mul(0.1), "yarn_log_multiplier is"),
    ],
)
def test_keys_that_mean_something_else_are_refused(
    tmp_path: Path, architecture: str, change: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    path = edited(tmp_path / "m.gguf", architecture, change)
    with pytest.raises(ConfigError) as caught:
        open_model(str(path))
    assert message in str(caught.value)


def test_yarn_of_another_length_is_refused(tmp_path: Path) -> None:
    """By transformers the number replaces YaRN's own, by others it multiplies it."""
    path = edited(
        tmp_path / "m.gguf", "qwen2", lambda w: w.add_rope_scaling_yarn_attn_factor(1.0), rope_parameters=ROPES[3]
    )
    with pytest.raises(ConfigError, match=r"yarn_attn_factor is 1\.0; it must be absent or 1\.13863, YaRN's own"):
        open_model(str(path))


def test_longrope_without_its_factors_is_refused(tmp_path: Path) -> None:
    path = edited(tmp_path / "m.gguf", "phi3", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))
    with pytest.raises(WeightError, match=r"lacks rope_factors_long\.weight and rope_factors_short\.weight"):
        open_model(str(path))


def test_short_factors_where_the_context_is_short(tmp_path: Path) -> None:
    """LongRoPE's divisors are chosen by the context that a model is opened for."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "attention_factor": 1.25}
    rope |= {"long_factor": [4.0] * 4, "short_factor": [2.0] * 4}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 8}
    path = edited(tmp_path / "m.gguf", "phi3", lambda writer: None, **options)
    first = [open_model(str(path), context=context).source.layer(0).attention for context in (None, 9, 8)]
    assert [float(each.rotary_frequency_J[0]) for each in first] == [0.25, 0.25, 0.5]


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_by_their_width(tmp_path: Path, architecture: str, layers: int) -> None:
    """48 elements for 6 heads of 6: by the root of 8 with so many layers, of 6 otherwise."""
    for count, divisor in ((layers, 8), (2, 6)):
        path = edited(tmp_path / f"{count}.gguf", architecture, lambda writer: None, layers=count)
        assert open_model(str(path)).config.layers[0].attention.scale == divisor**-0.5


@pytest.mark.parametrize(("key", "window"), [(None, 4096), (3, 3), (0, None)])
def test_starcoder2_sees_what_it_was_trained_to_see(tmp_path: Path, key: int | None, window: int | None) -> None:
    """In every layer; a file that does say so is believed."""

    def change(writer: gguf.GGUFWriter) -> None:
        if key is not None:
            writer.add_sliding_window(key)

    model = open_model(str(edited(tmp_path / "m.gguf", "starcoder2", change)))
    assert {layer.attention.window for layer in model.config.layers} == {window}


def test_mpt_without_alibi(tmp_path: Path) -> None:
    """Positions are then learned, or there are none."""
    path = edited(tmp_path / "m.gguf", "mpt", lambda writer: writer.add_max_alibi_bias(0.0))
    model = open_model(str(path))
    assert not model.config.layers[0].attention.alibi
    assert model.source.layer(0).attention.alibi_slope_H is None
