"""The twinfer form: a folder that holds a converted model, and needs nothing else.

    twinfer.json            the config and what else there is to know of the model
    embedding.safetensors   one file for each part, tensors by their dotted names (`kept` says how)
    layer-00000.safetensors ...
    head.safetensors
    tokenizer.json          where the model has a tokenizer

A folder appears whole or not at all: it is written beside its place, under a temporary name, and renamed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...spec.config import ModelConfig, Storage
from ...spec.counts import total
from ...spec.errors import CheckpointError, RequestError
from ...spec.shapes import Shapes, embedding_shapes, head_shapes, layer_shapes
from ...spec.shard import (
    Shard,
    Slices,
    check_ranks,
    embedding_slices,
    head_slices,
    layer_slices,
    sliced_shapes,
    slices_of_expert,
    slices_without_experts,
)
from ...spec.weights import (
    EmbeddingWeights,
    ExpertWeights,
    HeadWeights,
    LayerWeights,
    WeightSource,
    assemble,
    experts_of,
    tensors,
    validate_embedding,
    validate_head,
    validate_layer,
)
from ..config_json import from_json, to_json
from ..fields import Fields
from ..safetensors_folder import header_of
from ..source import cut, limited
from ..synced import sync
from ..tokenizer import Tokenizer, read_tokenizer
from .encoding import Quantizers, decode, encode, layout, layout_slices
from .temporary import remove_abandoned, temporary_folder

Part = TypeVar("Part", EmbeddingWeights, LayerWeights, HeadWeights)

DESCRIPTION = "twinfer.json"
TOKENIZER = "tokenizer.json"
ENDING = ".safetensors"
FORMAT = 1

REMEDY = "convert the model again"


def write(
    source: WeightSource,
    folder: Path,
    storage: Storage,
    *,
    quantizers: Quantizers,
    about: dict[str, Any],
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
) -> int:
    """Write a model, one part in memory at a time; returns the bytes written. `about` joins the description.

    Raises `RequestError` where the folder is there already, its parent is not, or the disk is too full, before any
    weight is read, and what the source raises. Where it fails nothing is left behind; what a killed process leaves is a
    hidden folder beside, `.NAME.partial-...`, which the next one that writes NAME removes.
    """
    try:
        _check_place(source.config, folder, storage)
        with temporary_folder(folder) as temporary:
            described = {"format": FORMAT, "storage": storage.value, "config": to_json(source.config), **about}
            described["tokenizer"] = tokenizer is not None
            _write_text(temporary / DESCRIPTION, json.dumps(described, indent=1, allow_nan=False))
            if tokenizer is not None:
                _write_text(temporary / TOKENIZER, tokenizer.inner.to_str())
            for name, part in _parts(source):
                report(f"writing {name} of {len(source.config.layers)} layers")
                _write_part(temporary / f"{name}{ENDING}", part, storage, quantizers)
                del part
            return _put_in_place(temporary, folder)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:
        raise RequestError(f"{folder} cannot be written: {error}") from None


def _check_place(config: ModelConfig, folder: Path, storage: Storage) -> None:
    parent = folder.absolute().parent
    if folder.exists() or folder.is_symlink():
        raise RequestError(f"{folder} is there already; give a folder that does not exist yet")
    if not parent.is_dir():
        raise RequestError(f"{folder} cannot be made: {parent} is no folder; make it first")
    remove_abandoned(folder)
    needed, free = total(config).bytes(storage), shutil.disk_usage(parent).free
    if free < needed:
        raise RequestError(f"{parent} has {free:,} bytes free; the model takes {needed:,} in {storage}: make room")


def _write_part(path: Path, part: Any, storage: Storage, quantizers: Quantizers) -> None:
    """Tensors that share memory, which the library refuses, are copied."""
    of_part: dict[str, Tensor] = {}
    places: set[int] = set()
    for each in tensors(part):
        for name, tensor in encode(*each, storage, quantizers).items():
            tensor = tensor.contiguous()
            of_part[name] = tensor.clone() if tensor.data_ptr() in places else tensor
            places.add(of_part[name].data_ptr())
    save_file(of_part, path)
    sync(path)


def _put_in_place(temporary: Path, folder: Path) -> int:
    size = sum(path.stat().st_size for path in temporary.iterdir())
    for path in temporary.iterdir():
        path.chmod(0o644)
    temporary.chmod(0o755)  # a temporary folder is its maker's alone
    sync(temporary)
    os.rename(temporary, folder)
    sync(folder.absolute().parent)
    return size


def _parts(source: WeightSource) -> Iterator[tuple[str, EmbeddingWeights | LayerWeights | HeadWeights]]:
    config = source.config
    embedding = source.embedding()
    validate_embedding(embedding, config)
    yield "embedding", embedding
    del embedding
    for index in range(len(config.layers)):
        layer = source.layer(index)
        validate_layer(layer, config, index)
        yield _layer_name(index), layer
        del layer
    head = source.head()
    validate_head(head, config)
    yield "head", head


class TwinferFolder:
    """A `WeightSource` over the twinfer form, and what else it says of the model.

    Every file's names, dtypes and shapes are checked here, before any tensor is read; raises `CheckpointError` for
    what is damaged or missing, and `ConfigError` for a description that says what no model can be.
    """

    def __init__(self, folder: Path, most_tokens: int | None = None):
        path = folder / DESCRIPTION
        fields = Fields.of_json(path.read_bytes(), str(path), remedy=REMEDY)
        fields.only("format", FORMAT)
        self.storage: Storage = fields.choice("storage", {each.value: each for each in Storage})
        section = fields.section("config")
        config = from_json(section.values if section else None, f"{path}: config")
        self.config: ModelConfig = limited(config, most_tokens)
        self.about = fields
        self._folder = folder
        self._shapes: dict[str, Shapes] = {"embedding": embedding_shapes(config), "head": head_shapes(config)}
        self._shapes |= {_layer_name(i): layer_shapes(each, config.hidden) for i, each in enumerate(config.layers)}
        self._check()

    def tensor_table(self) -> bytes:
        """Return what the files say of all their tensors, for ranks to compare."""
        return b"".join(header_of(self._folder / f"{name}{ENDING}") for name in self._shapes)

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        self._check_cuts(shard)
        slices = None if shard is None else embedding_slices(self.config, shard)
        return cut(self._read(EmbeddingWeights, "embedding", slices), self.config)

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        self._check_cuts(shard)
        slices = None if shard is None else layer_slices(self.config, index, shard)
        return self._read(LayerWeights, _layer_name(index), slices)

    def layer_without_experts(self, index: int) -> LayerWeights:
        return self._read(LayerWeights, _layer_name(index), slices_without_experts(self.config, index))

    def expert(self, index: int, expert: int) -> ExpertWeights:
        return experts_of(self._named(_layer_name(index), slices_of_expert(self.config, index, expert)))

    def head(self, shard: Shard | None = None) -> HeadWeights:
        self._check_cuts(shard)
        slices = None if shard is None else head_slices(self.config, shard)
        return self._read(HeadWeights, "head", slices)

    def tokenizer(self) -> Tokenizer | None:
        path = self._folder / TOKENIZER
        if not self.about.flag("tokenizer"):
            return None
        if not path.is_file():
            raise CheckpointError(f"{self._folder} lacks {TOKENIZER}; {REMEDY}")
        return read_tokenizer(path, REMEDY)

    def _check(self) -> None:
        there = {path.name for path in self._folder.glob(f"*{ENDING}")}
        if surplus := sorted(there - {f"{name}{ENDING}" for name in self._shapes}):
            raise CheckpointError(f"{self._folder} holds {surplus[0]}, which its config has no place for; {REMEDY}")
        for name, shapes in self._shapes.items():
            found, right = self._header(name), layout(shapes, self.storage)
            for tensor in [*right, *found]:
                if found.get(tensor) != right.get(tensor):
                    here, wanted = (_described(tensor, each.get(tensor)) for each in (found, right))
                    raise CheckpointError(
                        f"{self._folder / name}{ENDING}: {tensor} is {here}; in {self.storage}, by its config, it must "
                        f"be {wanted}: {REMEDY}"
                    )

    def _check_cuts(self, shard: Shard | None) -> None:
        if shard is not None:
            check_ranks(self.config, shard.ranks, self.storage, shard.experts)

    def _header(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        with self._opened(name) as file:
            slices = {_today(key): file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (an open file is no dict)
            return {key: (str(each.get_dtype()), tuple(each.get_shape())) for key, each in slices.items()}

    def _read(self, kind: type[Part], name: str, slices: Slices | None) -> Part:
        return assemble(kind, self._named(name, slices))

    def _named(self, name: str, slices: Slices | None) -> dict[str, Tensor]:
        shapes = self._shapes[name]
        with self._opened(name) as file:
            names = {_today(key): key for key in file.keys()}  # noqa: SIM118
            if slices is None:
                found: dict[str, Tensor] = {key: file.get_tensor(own) for key, own in names.items()}
            else:
                shapes = sliced_shapes(shapes, slices)
                cuts = layout_slices(slices, self.storage)
                found = {key: file.get_slice(names[key])[index] for key, index in cuts.items()}
        return decode(found, shapes, self.storage)

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self._folder / f"{name}{ENDING}"
        if not path.is_file():
            raise CheckpointError(f"{self._folder} lacks {path.name}; {REMEDY}")
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or corrupt: {error}; {REMEDY}") from None


def _today(name: str) -> str:
    """Return today's name of a tensor; an older version called the width of the token table E."""
    return name.replace("token_VE", "token_VW")


def _layer_name(index: int) -> str:
    return f"layer-{index:05}"


def _described(name: str, tensor: tuple[str, tuple[int, ...]] | None) -> str:
    if tensor is None:
        return "absent"
    dtype, shape = tensor
    of_experts = f" ({shape[0]} experts)" if name.endswith(".weight_ENI") and len(shape) == 3 else ""
    return f"{dtype} of shape {list(shape)}{of_experts}"


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
