"""The twinfer form: whatever the storage, a model that was written and opened again is the same, bit by bit."""

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from twinfer.checkpoint import Checkpoint, Tokenizer, open_model
from twinfer.checkpoint.native import folder as twinfer_folder
from twinfer.converting import convert
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.trial import same_bits
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.errors import CheckpointError, ConfigError, RequestError, WeightError
from twinfer.spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, tensors

storages = st.sampled_from(Storage)
seeds = st.integers(0, 2**20)


def checkpoint_of(source: Any, **fields: Any) -> Checkpoint:
    about: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
    return Checkpoint(name="drawn", source=source, config=source.config, **{**about, **fields})


def quiet(line: str) -> None:
    """Report to nobody."""


def model(seed: int = 3) -> RandomSource:
    return RandomSource(draw_model_config(RandomPicker(seed)), seed)


def all_tensors(path: ReferencePath) -> Iterator[tuple[str, Tensor]]:
    parts = {"embedding": path.weights.embedding, "head": path.weights.head}
    parts |= {f"layer {index}": layer for index, layer in enumerate(path.weights.layers)}  # type: ignore[misc]
    for name, part in parts.items():
        yield from ((f"{name} {key}", tensor) for key, tensor in tensors(part))


@given(seed=seeds, storage=storages)
@settings(max_examples=30)
def test_a_converted_model_is_the_same_bit_by_bit(seed: int, storage: Storage, tmp_path_factory: Any) -> None:
    source = model(seed)
    folder = tmp_path_factory.mktemp("converted") / "out"
    convert(checkpoint_of(source), folder, storage, quiet)
    opened = open_model(str(folder))
    assert opened.config == source.config
    assert opened.storage is storage
    ours, theirs = (
        dict(all_tensors(ReferencePath(each, storage=storage, compute=torch.float64)))
        for each in (opened.source, source)
    )
    assert ours.keys() == theirs.keys()
    assert all(same_bits(tensor, theirs[name]) for name, tensor in ours.items())


def test_files_hold_what_the_storage_says(tmp_path: Path) -> None:
    """Matrices in the storage, vectors in float32, angles in float64; opened by the safetensors library alone."""
    kept_as = (torch.float32, torch.bfloat16, torch.int8, torch.uint8)
    for storage, dtype in zip(Storage, kept_as, strict=True):
        folder = tmp_path / storage
        convert(checkpoint_of(model()), folder, storage, quiet)
        with safe_open(folder / "layer-00000.safetensors", framework="pt") as file:
            dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert dtypes["mlp.up.weight_NI"] is dtype
        assert ("mlp.up.weight_NI.absmax_N" in dtypes) == (storage is Storage.INT8)
        assert ("mlp.up.weight_NI.max_NG" in dtypes) == (storage is Storage.INT4)
        assert all(found is torch.float64 for name, found in dtypes.items() if "frequency" in name)
        beside = ("gain_M", "absmax_N", "min_NG", "max_NG")
        assert all(found is torch.float32 for name, found in dtypes.items() if name.endswith(beside))


def words() -> Tokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "paris": 1, "is": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(inner)


def test_what_surrounds_a_model_comes_along(tmp_path: Path) -> None:
    """The original is not needed: nothing in the folder names it."""
    about: dict[str, Any] = {
        "tokenizer": words(),
        "end_tokens": (2, 0),
        "chat_template": "{{ messages }} \N{SNOWMAN}",
        "special_tokens": {"eos_token": "is"},
    }
    before = checkpoint_of(model(), **about)
    convert(before, tmp_path / "out", Storage.BFLOAT16, quiet)
    moved = shutil.move(tmp_path / "out", tmp_path / "moved")
    after = open_model(str(moved))
    for name in ("name", "end_tokens", "chat_template", "special_tokens"):
        assert getattr(after, name) == getattr(before, name)
    assert after.tokenizer is not None
    assert after.tokenizer.encode("paris is nice") == [1, 2, 0]


@dataclass
class Watched:
    """A source that notes which of its parts are still held when the next is asked for."""

    source: RandomSource
    fail_at: int | None = None
    refs: list[Any] = field(default_factory=list)
    most: int = 0

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def _watched(self, part: Any) -> Any:
        self.refs += [weakref.ref(tensor) for _, tensor in tensors(part)]
        return part

    def _count(self) -> None:
        gc.collect()
        self.most = max(self.most, sum(ref() is not None for ref in self.refs))

    def embedding(self) -> EmbeddingWeights:
        self._count()
        return self._watched(self.source.embedding())

    def layer(self, index: int) -> LayerWeights:
        self._count()
        if index == self.fail_at:
            raise CheckpointError("the disk went away")
        return self._watched(self.source.layer(index))

    def head(self) -> HeadWeights:
        self._count()
        return self._watched(self.source.head())


def deep_model() -> RandomSource:
    config = model().config
    return RandomSource(replace(config, layers=config.layers[:1] * 4))


def test_one_part_is_held_at_a_time(tmp_path: Path) -> None:
    watched = Watched(deep_model())
    convert(checkpoint_of(watched), tmp_path / "out", Storage.INT8, quiet)
    assert watched.most == 0


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the disk went away"):
        convert(checkpoint_of(Watched(deep_model(), fail_at=2)), tmp_path / "out", Storage.INT8, quiet)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Crooked:
    """A source whose layers have a weight too many."""

    source: RandomSource

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    def embedding(self) -> EmbeddingWeights:
        return self.source.embedding()

    def layer(self, index: int) -> LayerWeights:
        layer = self.source.layer(index)
        return replace(layer, mlp=replace(layer.mlp, up=replace(layer.mlp.up, bias_N=torch.zeros(1))))

    def head(self) -> HeadWeights:
        return self.source.head()


def test_a_source_that_does_not_fit_its_config_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"layer 0 mlp\.up\.bias_N"):
        convert(checkpoint_of(Crooked(model())), tmp_path / "out", Storage.FLOAT32, quiet)
    assert list(tmp_path.iterdir()) == []


def there(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def dangling(tmp_path: Path) -> Path:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (there, "out is there already; give a folder that does not exist yet"),
        (dangling, "out is there already; give a folder that does not exist yet"),
        (lambda tmp_path: tmp_path / "no" / "out", "no is no folder; make it first"),
        (lambda tmp_path: tmp_path / ("o" * 300), "cannot be written: File name too long"),
    ],
)
def test_places_that_cannot_be_written_are_refused_before_reading(
    tmp_path: Path, place: Callable[[Path], Path], message: str
) -> None:
    watched = Watched(model())
    folder = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=message):
        convert(checkpoint_of(watched), folder, Storage.FLOAT32, quiet)
    assert watched.refs == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(model())
    monkeypatch.setattr(twinfer_folder.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 3, 7))  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match=r"has 7 bytes free; the model takes [\d,]+ in int8: make room"):
        convert(checkpoint_of(watched), tmp_path / "out", Storage.INT8, quiet)
    assert watched.refs == []


def test_a_storage_is_not_changed_twice(tmp_path: Path) -> None:
    convert(checkpoint_of(model()), tmp_path / "out", Storage.INT8, quiet)
    with pytest.raises(RequestError, match="kept in int8 already; convert the model that it came from"):
        convert(open_model(str(tmp_path / "out")), tmp_path / "second", Storage.FLOAT32, quiet)
    convert(open_model(str(tmp_path / "out")), tmp_path / "copy", Storage.INT8, quiet)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_that_share_memory_are_written_each(transposed: bool, tmp_path: Path) -> None:
    """As a source may have it, in rows or in columns; the files' library refuses them."""

    class Sharing(RandomSource):
        def layer(self, index: int) -> LayerWeights:
            layer = super().layer(index)
            weight_NI = layer.attention.key.weight_NI
            key = replace(layer.attention.key, weight_NI=weight_NI.t().contiguous().t() if transposed else weight_NI)
            return replace(layer, attention=replace(layer.attention, key=key, value=key))

    source = Sharing(model().config)
    convert(checkpoint_of(source), tmp_path / "out", Storage.FLOAT32, quiet)
    read = open_model(str(tmp_path / "out")).source.layer(0).attention
    assert same_bits(read.value.weight_NI, read.key.weight_NI)


def test_a_shorter_context_leaves_positions_out(tmp_path: Path) -> None:
    seed = next(each for each in range(100) if model(each).config.learned_positions)
    source = model(seed)
    convert(checkpoint_of(source), tmp_path / "out", Storage.FLOAT32, quiet)
    opened = open_model(str(tmp_path / "out"), context=5)
    assert opened.config.context == 5
    whole, part = source.embedding().position_PM, opened.source.embedding().position_PM
    assert whole is not None
    assert part is not None
    assert same_bits(part, whole[:5])
    with pytest.raises(ConfigError, match=f"asked for is 999999 tokens; in this model it must be 1 to {len(whole)}"):
        open_model(str(tmp_path / "out"), context=999_999)
