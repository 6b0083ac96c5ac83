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
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..spec.config import ModelConfig, Storage
from ..spec.counts import total
from ..spec.errors import CheckpointError, RequestError
from ..spec.weights import (
    EmbeddingWeights,
    HeadWeights,
    LayerWeights,
    WeightSource,
    assemble,
    tensors,
    validate_embedding,
    validate_head,
    validate_layer,
)
from .config_json import from_json, to_json
from .fields import Fields
from .kept import PEAK, given_back, kept
from .source import cut, limited
from .tokenizer import Tokenizer

Part = TypeVar("Part", EmbeddingWeights, LayerWeights, HeadWeights)

DESCRIPTION = "twinfer.json"
TOKENIZER = "tokenizer.json"
FORMAT = 1

REMEDY = "convert the model again"


def write(
    source: WeightSource,
    folder: Path,
    storage: Storage,
    *,
    about: dict[str, Any],
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
) -> int:
    """Write a model, one part in memory at a time; returns the bytes written. `about` joins the description.

    Raises `RequestError` where the folder is there already, its parent is not, or the disk is too full, before anything
    is read or written, and what the source raises. Nothing is left behind where it fails.
    """
    config, parent = source.config, folder.absolute().parent
    if folder.exists() or folder.is_symlink():
        raise RequestError(f"{folder} is there already; give a folder that does not exist yet")
    if not parent.is_dir():
        raise RequestError(f"{folder} cannot be made: {parent} is no folder; make it first")
    needed, free = total(config).bytes(storage), shutil.disk_usage(parent).free
    if free < needed:
        raise RequestError(f"{parent} has {free:,} bytes free; the model takes {needed:,} in {storage}: make room")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=parent))
    try:
        described = {"format": FORMAT, "storage": storage.value, "config": to_json(config), **about}
        _write_text(temporary / DESCRIPTION, json.dumps(described, indent=1, allow_nan=False))
        if tokenizer is not None:
            _write_text(temporary / TOKENIZER, tokenizer.inner.to_str())
        for name, part in _parts(source):
            report(f"writing {name} of {len(config.layers)} layers")
            of_part = {key: value for each in tensors(part) for key, value in kept(*each, storage).items()}
            path = temporary / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in of_part.items()}, path)
            _sync(path)
            del part, of_part
        size = sum(path.stat().st_size for path in temporary.iterdir())
        for path in temporary.iterdir():
            path.chmod(0o644)
        temporary.chmod(0o755)  # a temporary folder is its maker's alone
        _sync(temporary)
        os.rename(temporary, folder)
        _sync(parent)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from None
    except SafetensorError as error:
        raise RequestError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
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
        yield f"layer-{index:05}", layer
        del layer
    head = source.head()
    validate_head(head, config)
    yield "head", head


class TwinferFolder:
    """A `WeightSource` over the twinfer form, and what else it says of the model."""

    def __init__(self, folder: Path, most_tokens: int | None = None):
        path = folder / DESCRIPTION
        fields = Fields.of_json(path.read_bytes(), str(path))
        fields.only("format", FORMAT)
        self.storage: Storage = fields.choice("storage", {each.value: each for each in Storage})
        section = fields.section("config")
        config = from_json(section.values if section else None, f"{path}: config")
        self.config: ModelConfig = limited(config, most_tokens)
        self.about = fields
        self._folder = folder

    def embedding(self) -> EmbeddingWeights:
        weights = cut(self._read(EmbeddingWeights, "embedding"), self.config)
        validate_embedding(weights, self.config)
        return weights

    def layer(self, index: int) -> LayerWeights:
        weights = self._read(LayerWeights, f"layer-{index:05}")
        validate_layer(weights, self.config, index)
        return weights

    def head(self) -> HeadWeights:
        weights = self._read(HeadWeights, "head")
        validate_head(weights, self.config)
        return weights

    def tokenizer(self) -> Tokenizer | None:
        path = self._folder / TOKENIZER
        if not path.is_file():
            return None
        try:
            return Tokenizer(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        except OSError:
            raise
        except Exception as error:  # the library raises bare exceptions
            raise CheckpointError(f"{path} is no tokenizer ({error}); {REMEDY}") from None

    def _read(self, kind: type[Part], name: str) -> Part:
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{self._folder} lacks {path.name}; {REMEDY}")
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (an open file is no dict)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or corrupt: {error}; {REMEDY}") from None
        peaks = {key.removesuffix(PEAK): value for key, value in found.items() if key.endswith(PEAK)}
        weights = {key: given_back(value, peaks.get(key)) for key, value in found.items() if not key.endswith(PEAK)}
        return assemble(kind, weights)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Make what was written last; where folders cannot be opened, the system does so itself."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
