"""Writing a store: record by record, whole or not at all, and from where a killed run left off.

A store is made in a hidden folder beside its place, `.NAME.partial`, and renamed at the end. A journal there has one
line for each record that is safely on the disk; whoever builds the same store again goes on behind the last of them.
One layer is in memory at a time (and the token table, while it is cut into blocks, as its source hands it out).
"""

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..compiled.machine import return_freed_memory
from ..compiled.packing import ROWS, Matrix, Quantized, pack, quantize
from ..compiled.weights import find_rotations, prepare_embedding, prepare_head, prepare_layer, prepared_norm
from ..spec.ambient import CPU, pinned
from ..spec.config import INT4_GROUP, Head, ModelConfig, Storage
from ..spec.counts import total
from ..spec.decoder import check_extensible
from ..spec.errors import RequestError
from ..spec.shapes import is_matrix, layer_shapes
from ..spec.weights import LinearWeights, WeightSource, validate_embedding, validate_head, validate_layer
from .form import Record, Resident, bytes_of, written
from .locked import locked
from .store import DESCRIPTION, WEIGHTS, as_json, described, layout

_JOURNAL = "journal"
_BITS = {Storage.FLOAT32: 32, Storage.BFLOAT16: 16, Storage.INT8: 8, Storage.INT4: 4}
_LEAST_BLOCK = 1 << 16
"""Bytes of the smallest layer that blocks of the head are half of: below, a read costs more than what it brings."""


class _Part(NamedTuple):
    """What becomes a record."""

    kind: str
    """layers, head, table or resident."""
    name: str
    prepare: Callable[[], Any]


@dataclass(slots=True, kw_only=True)
class _Journal:
    """The records that a partial store holds already."""

    file: Path
    records: list[tuple[str, Record]]

    def add(self, kind: str, record: Record) -> None:
        """Note a record whose bytes are on the disk."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, as_json(record)]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append((kind, record))

    @property
    def end(self) -> int:
        return max((record.offset + record.nbytes for _, record in self.records), default=0)


def build(
    source: WeightSource,
    folder: Path,
    storage: Storage,
    *,
    model: dict[str, Any],
    files: Mapping[str, str],
    identity: object,
    report: Callable[[str], None],
) -> int:
    """Write a model's store; returns the bytes of its weights.

    `model` is what there is to know of the model besides, as JSON, and `files` are texts that lie in the folder too.
    `identity` is JSON that tells this source from others: a partial store of another one is not gone on with.

    Raises `RequestError` where the folder is there already, cannot be made, is being built by another process, or the
    disk is full; and what the source raises. What was written until then stays, and the next call goes on from there.
    """
    config = source.config
    check_extensible(config)
    _check_place(folder)
    partial = folder.absolute().parent / f".{folder.name}.partial"
    try:
        partial.mkdir(exist_ok=True)
        with locked(partial, f"{folder} is being built by another process; wait for it"), pinned(CPU):
            begin = {"layout": layout(), "storage": storage.value, "model": model, "identity": identity}
            journal = _journal(partial, json.dumps(begin, sort_keys=True))
            _check_room(config, storage, partial, journal.end)
            parts = list(_parts(source, storage))
            try:
                for index in range(len(journal.records), len(parts)):
                    report(f"writing {parts[index].name} ({index + 1} of {len(parts)} records)")
                    _append(partial / WEIGHTS, journal, parts[index])
            except OSError as error:
                raise RequestError(
                    f"{folder} cannot be written: {error.strerror or error}; {len(journal.records)} of {len(parts)} "
                    f"records are kept: run the same command again to go on, or remove {partial}"
                ) from None
            return _finish(partial, folder, storage, model, files, journal)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from None


def _check_place(folder: Path) -> None:
    parent = folder.absolute().parent
    if folder.exists() or folder.is_symlink():
        raise RequestError(f"{folder} is there already; give a folder that does not exist yet")
    if not parent.is_dir():
        raise RequestError(f"{folder} cannot be made: {parent} is no folder; make it first")


def _check_room(config: ModelConfig, storage: Storage, partial: Path, there: int) -> None:
    needed, free = total(config).bytes(storage) - there, shutil.disk_usage(partial).free
    if free < needed:
        raise RequestError(
            f"{partial.parent} has {free:,} bytes free; the store takes {needed:,} more in {storage}: make room"
        )


def _journal(partial: Path, begin: str) -> _Journal:
    """Return what a killed run left, cut back to what is whole; nothing if it was of another model."""
    path, weights = partial / _JOURNAL, partial / WEIGHTS
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
    if len(lines) > 1 and lines[0] == begin and weights.is_file():  # the last line is empty, or was cut short
        records = [(kind, Record(**values)) for kind, values in map(json.loads, lines[1:-1])]
    else:
        records, lines = [], [begin, ""]
    journal = _Journal(file=path, records=records)
    whole = "\n".join([*lines[:-1], ""])
    path.write_text(whole, encoding="utf-8")
    with weights.open("ab") as file:
        file.truncate(journal.end)
    return journal


def _append(weights: Path, journal: _Journal, part: _Part) -> None:
    record, pieces = written(part.prepare(), part.name, journal.end)
    with weights.open("r+b") as file:
        file.seek(record.offset)
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), record.offset, record.nbytes, os.POSIX_FADV_DONTNEED)
    journal.add(part.kind, record)
    return_freed_memory()


def _finish(
    partial: Path, folder: Path, storage: Storage, model: dict[str, Any], files: Mapping[str, str], journal: _Journal
) -> int:
    of_kind: dict[str, list[Record]] = {kind: [] for kind in ("layers", "head", "table", "resident")}
    for kind, record in journal.records:
        of_kind[kind].append(record)
    table = of_kind["table"] or None
    text = described(storage, model, of_kind["resident"][0], of_kind["layers"], of_kind["head"], table)
    for name, content in {**files, DESCRIPTION: text}.items():
        with (partial / name).open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    journal.file.unlink()
    os.rename(partial, folder)
    _sync(folder)
    _sync(folder.absolute().parent)
    return journal.end


def _sync(folder: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _parts(source: WeightSource, storage: Storage) -> Iterator[_Part]:
    """Yield what a store holds, in the file's order. Nothing is read before it is prepared."""
    config = source.config
    blocks = _Blocks(source, storage)
    for index in range(len(config.layers)):
        yield _Part("layers", f"layer {index}", lambda index=index: blocks.layer(index))  # type: ignore[misc]
    tied = blocks.tied
    for kind in ("head",) if tied else ("head", "table"):
        for first in range(0, blocks.rows * blocks.count, blocks.rows):
            name = f"{kind} rows {first} to {min(first + blocks.rows, config.vocabulary) - 1}"
            yield _Part(kind, name, lambda kind=kind, first=first: blocks.block(kind, first))  # type: ignore[misc]
    yield _Part("resident", "what stays in memory", blocks.resident)


class _Blocks:
    """Prepares the parts of a model, holding on to the token table while that is cut."""

    def __init__(self, source: WeightSource, storage: Storage) -> None:
        self._source, self._config, self._storage = source, source.config, storage
        self._frequencies: dict[int, Tensor | None] = {}
        self._checksums: dict[tuple[str, int], list[int]] = {}
        self._whole: tuple[str, Quantized, Tensor | None] | None = None
        least = max(_LEAST_BLOCK, max(_layer_bytes(source.config, index, storage) for index in _indices(source.config)))
        most = max(ROWS, least * 4 // (_BITS[storage] * _padded(source.config.table_width)))
        self.count = -(-source.config.vocabulary // most)
        self.rows = -(-source.config.vocabulary // self.count // ROWS) * ROWS

    @property
    def tied(self) -> bool:
        """Whether the head is the token table."""
        return self._config.head is Head.TIED

    def layer(self, index: int) -> Any:
        weights = self._source.layer(index)
        validate_layer(weights, self._config, index)
        self._note_frequency(index, weights.attention.rotary_frequency_J)
        return prepare_layer(weights, self._config.layers[index], self._storage, CPU)

    def block(self, kind: str, first: int) -> Matrix:
        """Return rows of the head or of the table, packed; rows past the vocabulary are zeros."""
        if self._whole is None or self._whole[0] != kind:
            self._whole = None
            self._whole = (kind, *self._matrix(kind))
        _, quantized, bias_V = self._whole
        end = min(first + self.rows, self._config.vocabulary)
        lacking = first + self.rows - end
        cut = quantized.rows(first, end)
        scale_N = None if cut.scale_N is None else functional.pad(cut.scale_N, (0, lacking))
        bias_N = None if bias_V is None else functional.pad(bias_V[first:end].to(torch.float32), (0, lacking))
        block = pack(Quantized(functional.pad(cut.weight_NI, (0, 0, 0, lacking)), self._storage, scale_N), bias_N)
        self._checksums[kind, first] = checksums_of(block)
        return block

    def resident(self) -> Resident:
        config, storage = self._config, self._storage
        for index in _indices(config):
            if index not in self._frequencies:  # a run that was killed had read it
                self._note_frequency(index, self._source.layer(index).attention.rotary_frequency_J)
        kind = "head" if self.tied else "table"
        firsts = range(0, self.rows * self.count, self.rows)
        for first in firsts:
            if (kind, first) not in self._checksums:
                self.block(kind, first)
        checksums = [each for first in firsts for each in self._checksums[kind, first]]
        self._whole = None
        weights = self._source.embedding()
        validate_embedding(weights, config)
        narrow = LinearWeights(weight_NI=weights.token_VW[:1])
        embedding = prepare_embedding(
            type(weights)(
                token_VW=narrow.weight_NI,
                position_PM=weights.position_PM,
                type_YM=weights.type_YM,
                norm=weights.norm,
                projection=weights.projection,
            ),
            config,
            storage,
            CPU,
        )
        head = self._head()
        small = type(head)(norm=head.norm, reduction=head.reduction)
        after = prepare_head(small, config, storage, CPU, tied=embedding.table)
        frequencies = [self._frequencies[index] for index in _indices(config)]
        return Resident(
            projection=embedding.projection,
            position_PM=embedding.position_PM,
            type_YM=embedding.type_YM,
            embedding_norm=embedding.norm,
            rotations=find_rotations(frequencies, config, CPU),
            head_norm=prepared_norm(head.norm, config.final_norm, CPU),
            reduction=after.reduction,
            table_checksum_B=torch.tensor(checksums, dtype=torch.int64),
        )

    def _head(self) -> Any:
        head = self._source.head()
        validate_head(head, self._config)
        return head

    def _matrix(self, kind: str) -> tuple[Quantized, Tensor | None]:
        head = self._head()
        if kind == "head" and head.projection is not None:
            return quantize(head.projection.weight_NI.detach(), self._storage), head.bias_V
        weights = self._source.embedding()
        validate_embedding(weights, self._config)
        return quantize(weights.token_VW.detach(), self._storage), head.bias_V if kind == "head" else None

    def _note_frequency(self, index: int, frequency_J: Tensor | None) -> None:
        self._frequencies[index] = None if frequency_J is None else frequency_J.detach().clone()


def checksums_of(block: Matrix) -> list[int]:
    """Return the CRC-32 of each block of U rows of a packed matrix (of float32, of each row), as it is looked up."""
    parts = [part for part in (block.word, block.scale_N, block.scale_BGU, block.min_BGU) if part is not None]
    units = len(block.word)
    found = [0] * units
    for part in parts:
        raw = bytes_of(part)
        size = len(raw) // units
        found = [zlib.crc32(raw[unit * size : (unit + 1) * size], found[unit]) for unit in range(units)]
    return found


def _layer_bytes(config: ModelConfig, index: int, storage: Storage) -> int:
    shapes = layer_shapes(config.layers[index], config.hidden)
    bits = {name: _BITS[storage] if is_matrix(name) else 32 for name in shapes}
    return sum(bits[name] * math.prod(shape) for name, shape in shapes.items()) // 8


def _padded(inputs: int) -> int:
    return -(-inputs // INT4_GROUP) * INT4_GROUP


def _indices(config: ModelConfig) -> range:
    return range(len(config.layers))
