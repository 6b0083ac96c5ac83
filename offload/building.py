"""Writing a store: record by record, whole or not at all, and from where a killed run left off.

A store is made in a hidden folder beside its place, `.NAME.partial`, and renamed at the end. A journal there has one
line for each record that is safely on the disk; whoever builds the same store again goes on behind the last of them.
One layer is in memory at a time, or one expert where the source reads them one by one (and the token table, while it is
cut into blocks, as its source hands it out).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compiled.machine import return_freed_memory
from ..spec.ambient import CPU, pinned
from ..spec.config import Storage
from ..spec.counts import total
from ..spec.decoder import check_extensible
from ..spec.errors import RequestError, TwinferError
from ..spec.weights import (
    WeightSource,
)
from .form import Record, written
from .locked import locked
from .parts import Part, experts_of_layer, mlp_records, parts
from .store import DESCRIPTION, WEIGHTS, as_json, described, layout

_JOURNAL = "journal"


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
    device: str = "cpu",
) -> int:
    """Write a model's store, for a type of device; returns the bytes of its weights.

    `model` is what there is to know of the model besides, as JSON, and `files` are texts that lie in the folder too.
    `identity` is JSON that tells this source from others: a partial store of another one is not gone on with.

    Raises `RequestError` where the folder is there already, cannot be made, is being built by another process, or the
    disk is full; and what the source raises. Records that are on the disk by then stay after a kill and where the disk
    is full, and the next call goes on from there; otherwise nothing is left (`without_remains`).
    """
    config = source.config
    check_extensible(config)
    check_place(folder)
    partial = folder.absolute().parent / f".{folder.name}.partial"
    try:
        partial.mkdir(exist_ok=True)
        with (
            locked(partial, f"{folder} is being built by another process; wait for it"),
            without_remains(partial, _has_records),
            pinned(CPU),
        ):
            begin = {"layout": layout(), "storage": storage.value, "model": model, "identity": identity}
            begin |= {} if device == "cpu" else {"device": device}
            journal = _journal(partial, json.dumps(begin, sort_keys=True))
            check_room(partial, total(config).bytes(storage) - journal.end, storage)
            planned = list(parts(source, storage, device))
            try:
                for index in range(len(journal.records), len(planned)):
                    report(f"writing {planned[index].name} ({index + 1} of {len(planned)} records)")
                    _append(partial / WEIGHTS, journal, planned[index])
            except OSError as error:
                if not journal.records:
                    raise
                raise RequestError(
                    f"{folder} cannot be written: {error.strerror or error}; {len(journal.records)} of {len(planned)} "
                    f"records are kept: run the same command again to go on, or remove {partial}"
                ) from None
            return _finish(partial, folder, source, storage, model, files, journal, device)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def without_remains(partial: Path, has_records: Callable[[Path], bool]) -> Iterator[None]:
    """Remove a partial store where what happens within fails, and nothing is there that a later run could go on from.

    A source that fails (`TwinferError` but `RequestError`) does so again, so then records are of no use either.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        of_source = isinstance(error, TwinferError) and not isinstance(error, RequestError)
        if of_source or not has_records(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _has_records(partial: Path) -> bool:
    """Return whether the journal has a line for a record, after its first line."""
    journal = partial / _JOURNAL
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1


def check_place(folder: Path) -> None:
    """Raise `RequestError` where a store cannot be made."""
    parent = folder.absolute().parent
    if folder.exists() or folder.is_symlink():
        raise RequestError(f"{folder} is there already; give a folder that does not exist yet")
    if not parent.is_dir():
        raise RequestError(f"{folder} cannot be made: {parent} is no folder; make it first")


def check_room(partial: Path, needed: int, storage: Storage) -> None:
    """Raise `RequestError` where the disk has less room than a partial store still needs."""
    free = shutil.disk_usage(partial).free
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


def _append(weights: Path, journal: _Journal, part: Part) -> None:
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
    partial: Path,
    folder: Path,
    source: WeightSource,
    storage: Storage,
    model: dict[str, Any],
    files: Mapping[str, str],
    journal: _Journal,
    device: str,
) -> int:
    of_kind: dict[str, list[Record]] = {kind: [] for kind in ("layers", "mlp", "experts", "head", "table", "resident")}
    for kind, record in journal.records:
        of_kind[kind].append(record)
    table = of_kind["table"] or None
    pairs = iter(zip(of_kind["experts"][::2], of_kind["experts"][1::2], strict=True))
    indices = range(len(source.config.layers))
    experts = [[next(pairs) for _ in range(experts_of_layer(source, index))] for index in indices]
    blocks = iter(of_kind["mlp"])
    counts = [mlp_records(source, index, storage, device) for index in indices]
    mlp = [[[next(blocks) for _ in range(count)] for count in of_layer] for of_layer in counts]
    of_layers = of_kind["layers"], mlp, experts, of_kind["head"], table
    text = described(storage, model, of_kind["resident"][0], *of_layers, device=device)
    for name, content in {**files, DESCRIPTION: text}.items():
        with (partial / name).open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    journal.file.unlink()
    os.rename(partial, folder)
    sync_folder(folder)
    sync_folder(folder.absolute().parent)
    return journal.end


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
