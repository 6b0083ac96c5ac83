"""Mixtures in GGUF files beside llama.cpp, where llama-cpp-python is installed: one file, read and computed by both.

llama.cpp is judged as a path of ours would be, over ragged prompts and with its own cache. It rounds what a quantized
matmul reads to the format of the weights, so what bounds its error is then the reference whose experts read rounded
inputs.

Shapes: T tokens, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from twinfer.bench.peers.libraries import llama_cpp
from twinfer.checkpoint import open_model
from twinfer.oracle.baseline import Baseline, nudging
from twinfer.oracle.paths import PathMismatch, assert_paths_agree
from twinfer.oracle.schedule import GREEDY, Close, Extend, Open
from twinfer.reference.components import DEFAULT, Components, Linear
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import MlpConfig, ModelConfig
from twinfer.spec.weights import LinearWeights, MlpWeights, WeightSource

from ..families.conftest import Altered
from ..families.experts_family import GATE_AND_UP_SWAPPED, router_with
from .gguf_converter import Config
from .gguf_kind import Kind
from .gguf_kinds_moe import MOE_KINDS
from .gguf_kinds_sigmoid import SIGMOID_KINDS
from .test_gguf_experts import usual, write

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

FORMATS = gguf.GGMLQuantizationType
SAME = [kind for kind in (*MOE_KINDS, *SIGMOID_KINDS) if kind.architecture not in ("phimoe", "gpt-oss")]
"""Without those that llama.cpp computes otherwise than their makers (docs/differences.md)."""
EVERY_HEAD = ("olmoe", "dots1")
"""Of these it reads only models with a key for every query."""
WHOLE_BLOCKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3moe": {"moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {},
}
"""Models whose experts have blocks of 32 in each row."""


SCHEDULE = (
    Open("a", 2, 20),
    Extend("a", ((3, 1, 4, 1, 5), (2,)), every_position=True),
    Extend("a", ((9, 2), (7, 1, 8)), every_position=True),
    *[Extend("a", ((GREEDY,), (GREEDY,)))] * 2,
    Close("a"),
)
"""Ragged prompts in two pieces, and two decode steps of both: 15 rows."""


@dataclass(eq=False)
class Held:
    """Sequences in a context of llama.cpp's."""

    context: Any
    lengths: tuple[int, ...]
    last: list[Tensor | None]

    def close(self) -> None:
        llama_cpp().llama_free(self.context)


class LlamaCppPath:
    """llama.cpp on a GGUF file as a `Decoder`: one thread, keys and values in float32, no flash attention."""

    device = torch.device("cpu")
    max_batch = None

    def __init__(self, file: Path, config: ModelConfig) -> None:
        library = llama_cpp()
        self.config = config
        self._model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
        assert self._model, "llama.cpp cannot load the file"

    def close(self) -> None:
        llama_cpp().llama_model_free(self._model)

    def open(self, batch: int, reserve: int) -> Held:
        library = llama_cpp()
        settings = library.llama_context_default_params()
        settings.n_ctx = batch * 256
        settings.n_seq_max, settings.n_batch, settings.n_ubatch = batch, 256, 256
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = library.llama_init_from_model(self._model, settings)
        assert context, "llama.cpp makes no context"
        return Held(context, (0,) * batch, [None] * batch)

    def extend(self, held: Held, new_tokens: Sequence[Tensor], *, every_position: bool = False) -> Any:
        library = llama_cpp()
        given = [(index, place, token) for index, each in enumerate(new_tokens) for place, token in enumerate(each)]
        batch = library.llama_batch_init(len(given), 0, 1)
        batch.n_tokens = len(given)
        for at, (index, place, token) in enumerate(given):
            batch.token[at], batch.pos[at] = int(token), held.lengths[index] + place
            batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, index, 1
        assert not given or library.llama_decode(held.context, batch) == 0
        library.llama_batch_free(batch)
        pointer = ctypes.cast(library.llama_get_logits(held.context), ctypes.POINTER(ctypes.c_float))
        shape = (len(given), self.config.vocabulary)
        rows = torch.from_numpy(np.ctypeslib.as_array(pointer, shape).copy()) if given else torch.empty(shape)
        pieces = list(torch.split(rows, [len(each) for each in new_tokens]))
        held.lengths = tuple(length + len(each) for length, each in zip(held.lengths, new_tokens, strict=True))
        held.last = [piece[-1] if len(piece) else last for piece, last in zip(pieces, held.last, strict=True)]
        return pieces if every_position else torch.stack([last for last in held.last if last is not None])


def written(kind: Kind, config: Config, path: Path, form: FORMATS = FORMATS.F32) -> tuple[WeightSource, LlamaCppPath]:
    """Write a model with its experts in a format; return what we read of it, and what llama.cpp makes of it."""

    def named(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("none")
        if f"{kind.architecture}.vocab_size" not in writer.kv_data[0]:
            writer.add_vocab_size(config.vocab_size)

    write(path, kind, config, form=form, keys=named)
    source = open_model(str(path)).source
    return source, LlamaCppPath(path, source.config)


def rounding(components: Components, form: FORMATS) -> Components:
    """The components, with what experts read rounded to a format, as llama.cpp does before it multiplies."""

    def mlp(x_BTM: Tensor, weights: MlpWeights, config: MlpConfig, *, linear: Linear) -> Tensor:
        def of_rounded(x: Tensor, weights: LinearWeights) -> Tensor:
            rounded = dequantize(quantize(x.float().numpy(), form), form)
            return linear(torch.from_numpy(rounded).to(x.dtype), weights)

        return components.mlp(x_BTM, weights, config, linear=of_rounded)

    return replace(components, mlp=mlp)


def judged_by(source: WeightSource, form: FORMATS) -> Baseline:
    """Return the truth, and six eager runs whose experts read inputs rounded to the format."""
    plain = Baseline.of(source)
    if form is FORMATS.F32:
        return plain
    eager = ReferencePath(source, compute=torch.float32)
    parts = [DEFAULT, *(nudging(run) for run in range(1, 6))]
    return Baseline(plain.truth, tuple(eager.with_components(rounding(each, form)) for each in parts))


def config_of(kind: Kind, **fields: Any) -> Config:
    heads = {"num_key_value_heads": 4} if kind.architecture in EVERY_HEAD else {}
    return usual(kind, **heads, **fields)


@pytest.mark.parametrize("kind", SAME, ids=[f"{kind.architecture}-{kind.model.__name__}" for kind in SAME])
def test_llama_cpp_is_within_the_budget_of_the_reference(kind: Kind, tmp_path: Path) -> None:
    """In float32, of every row that no near-tie of a router comes before."""
    source, path = written(kind, config_of(kind), tmp_path / "m.gguf")
    compared = assert_paths_agree(judged_by(source, FORMATS.F32), path, SCHEDULE)
    assert compared.rows > 5
    path.close()


@pytest.mark.parametrize("form", [FORMATS.F16, FORMATS.Q8_0])
@pytest.mark.parametrize("architecture", WHOLE_BLOCKS)
def test_quantized_experts_are_within_that_of_rounded_inputs(architecture: str, form: FORMATS, tmp_path: Path) -> None:
    kind = next(kind for kind in MOE_KINDS if kind.architecture == architecture)
    config = config_of(kind, **WHOLE_BLOCKS[architecture])
    source, path = written(kind, config, tmp_path / "m.gguf", form)
    compared = assert_paths_agree(judged_by(source, form), path, SCHEDULE)
    assert compared.rows > 5
    path.close()


@pytest.mark.parametrize("wrong", [GATE_AND_UP_SWAPPED, router_with(renormalize=False)])
def test_another_model_is_seen(wrong: dict[str, Any], tmp_path: Path) -> None:
    kind = next(kind for kind in MOE_KINDS if kind.architecture == "qwen3moe")
    source, path = written(kind, config_of(kind), tmp_path / "m.gguf")
    baseline = judged_by(Altered(source, **wrong), FORMATS.F32)
    with pytest.raises(PathMismatch):
        assert_paths_agree(baseline, path, SCHEDULE)
    path.close()
