"""GGUF files as models, of every architecture that `gguf_architectures` knows."""

from typing import Any

from ...spec.errors import CheckpointError
from ..family import refuse_latent_attention
from ..fields import Fields
from ..source import FileSource
from . import rotary as gguf_rotary
from .architectures import ARCHITECTURES
from .config import understood
from .file import GgufFile
from .table import table


def source(file: GgufFile, metadata: dict[str, Any], most_tokens: int | None = None) -> FileSource:
    """The weights of a GGUF file. Raises `CheckpointError`, `ConfigError` or `WeightError` for what cannot be used."""
    name = _architecture(file, metadata)
    prefix, architecture = f"{name}.", ARCHITECTURES[name]
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    fields = Fields(values, f"{file.where}: {prefix}", most_tokens=most_tokens)
    read = understood(name, architecture, fields, file)
    used = () if architecture.rotary is None else gguf_rotary.TENSORS
    layers = len(read.config.layers)
    names = table(architecture, file.shapes, range(layers, fields.integer("block_count")))
    return FileSource(
        read.config, names, _Without(file, used), read.buffers(), most_tokens=most_tokens, notes=fields.notes
    )


def _architecture(file: GgufFile, metadata: dict[str, Any]) -> str:
    general = Fields(metadata, f"{file.where}: ")
    architecture = general.text("general.architecture")
    if architecture not in ARCHITECTURES:
        refuse_latent_attention(general, f"{architecture}.attention.")
        raise CheckpointError(
            f"{file.where} is of architecture {architecture!r}; the GGUF architectures known here are: "
            + ", ".join(ARCHITECTURES)
        )
    kind = general.text("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{file.where} holds a GGUF {kind}; it must hold a model")
    if (pieces := general.integer("split.count", 1, least=0)) > 1:
        raise CheckpointError(f"{file.where} is one of {pieces} pieces; join them with llama-gguf-split --merge")
    return architecture


class _Without:
    """A file but for some tensors, which have been used already."""

    def __init__(self, file: GgufFile, names: tuple[str, ...]):
        self.where = file.where
        self.shapes = {name: shape for name, shape in file.shapes.items() if name not in names}
        self.tensor_table = file.tensor_table
        self.read = file.read
        self.read_slice = file.read_slice
        self.unreadable = file.unreadable
