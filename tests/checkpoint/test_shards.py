"""Folders, live modules and GGUF files hand out a rank's share of a model: its own elements, and no more bytes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from twinfer.checkpoint import Checkpoint, from_transformers, open_model
from twinfer.checkpoint.families import FAMILIES
from twinfer.checkpoint.source import FileSource
from twinfer.converting import convert
from twinfer.oracle.case import Picker, RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.reference.quantize import stored
from twinfer.spec.config import INT4_GROUP, LayerConfig, ModelConfig, Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.shapes import is_matrix
from twinfer.spec.shard import Shard, degrees
from twinfer.spec.weights import WeightSource

from ..shards import assert_reads_no_further, assert_shards_join, shareable
from .test_gguf import write

KINDS = gguf.GGMLQuantizationType
SIZES = {"vocab_size": 30, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}


def llama(**changes: Any) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 32}
    wide = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": False}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, **heads, **wide, **changes})).eval()


def gpt2() -> hf.GPT2LMHeadModel:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=30, n_positions=32, n_embd=24, n_layer=2, n_head=4)).eval()


def gpt_neox() -> hf.GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES, num_attention_heads=4)).eval()


def phi3() -> hf.Phi3ForCausalLM:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**SIZES, **heads)).eval()


@dataclass
class Counted:
    """A file's store, and the bytes of what it handed out."""

    inner: Any
    bytes: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, name: str) -> Tensor:
        return self._counted(self.inner.read(name))

    def read_slice(self, name: str, cuts: tuple[slice, ...]) -> Tensor:
        return self._counted(self.inner.read_slice(name, cuts))

    def _counted(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.nbytes
        return tensor


@pytest.mark.parametrize("module", [llama(), gpt2(), gpt_neox(), phi3()], ids=["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_folder_and_a_live_module_are_shared(module: Any, tmp_path: Path) -> None:
    """Of safetensors as many bytes are read as the share has: of separate, transposed, interleaved and stacked rows."""
    module.save_pretrained(tmp_path)
    source = open_model(str(tmp_path)).source
    assert isinstance(source, FileSource)
    store = source._store = Counted(source._store)
    table = next(family.table for family in FAMILIES if family.model_type == module.config.model_type)
    assert assert_shards_join(source) == [1, 2, 4]
    assert_reads_no_further(source, store, table)
    assert assert_shards_join(from_transformers(module)) == [1, 2, 4]


def test_a_share_of_a_file_is_a_view_of_it(tmp_path: Path) -> None:
    """The file is mapped, and a slice of it not copied: only pages that hold some of the slice are read, when used."""
    save_file({"weight": torch.randn(8, 6)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        whole, columns = file.get_tensor("weight"), file.get_slice("weight")[:, 2:4]
    assert columns.stride() == whole.stride()
    assert not columns.is_contiguous()


def test_a_share_of_a_live_module_is_a_view_of_it() -> None:
    module = llama()
    layer = from_transformers(module).layer(1, Shard(rank=1, ranks=2))
    with torch.no_grad():
        module.model.layers[1].self_attn.q_proj.weight[64] = 7.0
        module.model.layers[1].mlp.down_proj.weight[:, 48] = 8.0
    assert bool((layer.attention.query.weight_NI[0] == 7.0).all())
    assert bool((layer.mlp.down.weight_NI[:, 0] == 8.0).all())


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("width", [128, 96], ids=["between blocks", "inside blocks"])
def test_a_gguf_file_is_shared(kind: gguf.GGMLQuantizationType, width: int, tmp_path: Path) -> None:
    """Rows that the converter permuted, and columns that end between blocks of 32 quantized values or inside one."""
    write(tmp_path / "model.gguf", llama(intermediate_size=width), kind)
    assert assert_shards_join(open_model(str(tmp_path / "model.gguf")).source) == [1, 2, 4]


# Folders that twinfer has written.


def in_groups(pick: Picker) -> ModelConfig:
    """A drawn config whose columns one, two or four ranks can cut at the ends of groups."""
    config = shareable(pick)
    kv_heads = pick.choice([1, 2, 8])

    def wide(layer: LayerConfig) -> LayerConfig:
        attention = replace(layer.attention, heads=8, kv_heads=kv_heads, head_size=INT4_GROUP // 2)
        return replace(layer, attention=attention, mlp=replace(layer.mlp, width=4 * INT4_GROUP))

    return replace(config, layers=tuple(wide(layer) for layer in config.layers[:1]))


def converted(source: WeightSource, folder: Path, storage: Storage) -> WeightSource:
    about: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
    checkpoint = Checkpoint(name="drawn", source=source, config=source.config, **about)
    convert(checkpoint, folder, storage, lambda line: None)
    return open_model(str(folder)).source


class Denormal(RandomSource):
    """With some rows so small that their int8 scale is denormal, or zero."""

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = super()._tensor(part, name, shape)
        if is_matrix(name):
            tensor[::3] *= 2.0**-141
            tensor[1::5] *= 2.0**-147
        return tensor


@pytest.mark.parametrize("storage", Storage)
@given(seed=st.integers(0, 2**20))
@settings(max_examples=6)
def test_a_share_of_stored_values_is_the_same_stored_values(
    storage: Storage, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rows keep the scale of the whole row on every rank, and groups theirs, whatever a rank holds of them."""
    folder = tmp_path_factory.mktemp("folder") / "out"
    source = converted(Denormal(in_groups(RandomPicker(seed)), seed), folder, storage)
    assert assert_shards_join(source, storage) == [1, 2, 4]


def test_int4_is_not_cut_inside_a_group(tmp_path: Path) -> None:
    config = in_groups(RandomPicker(0))
    layer = config.layers[0]
    narrow = replace(config, layers=(replace(layer, mlp=replace(layer.mlp, width=2 * INT4_GROUP)),))
    source = converted(RandomSource(narrow), tmp_path / "out", Storage.INT4)
    assert degrees(narrow, Storage.INT4) == (1, 2)
    assert 4 in degrees(narrow)
    for read in (source.embedding, source.head, lambda shard: source.layer(0, shard)):
        with pytest.raises(RequestError, match=r"ranks is 4, but layer 0 down has 128 columns.* it is 2"):
            read(Shard(rank=0, ranks=4))


def test_folders_with_an_older_name_of_the_token_table_are_read(tmp_path: Path) -> None:
    """The width of the table was once called E, and folders were written with that name."""
    source = RandomSource(in_groups(RandomPicker(1)))
    converted(source, tmp_path / "out", Storage.INT8)
    path = tmp_path / "out" / "embedding.safetensors"
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (an open file is no dict)
    save_file({name.replace("token_VW", "token_VE"): tensor for name, tensor in held.items()}, path)
    older = open_model(str(tmp_path / "out")).source
    table_VW = source.embedding().token_VW
    assert same_bits(*(stored(each, Storage.INT8, torch.float64) for each in (older.embedding().token_VW, table_VW)))
    assert assert_shards_join(older, Storage.INT8) == [1, 2, 4]
