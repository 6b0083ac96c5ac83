"""A store: a folder with a model's prepared layers in one file, ready to be streamed.

    store.json      what the file holds, and what else there is to know of the model
    weights.bin     records, one after the other, each of whole pages
    tokenizer.json  where the model has a tokenizer (whoever builds the store puts it there)

`schedule` is what a step goes through: the layers, then the head in blocks of rows. A dense layer is several records,
attention and blocks of its MLP (`cutting`), unless it is small. Of a mixture of experts the layer's record holds what
every token needs; each expert is two records behind each other, its up (with its gate) and its down.
A token table that is not the head lies in blocks of its own, of which single rows are looked up. Layers are packed for
one processor's vectors, by one version of torch and of this package; a store says which, and is refused where they are
others. A GPU's layers are packed the same way, but cut less (`cutting`): a store says what type of device it is for.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiled.packing import ROWS, Matrix
from ..compiled.weights import Layer
from ..spec.config import ModelConfig, Storage
from ..spec.errors import CheckpointError
from .direct import DirectFile, aligned_buffer
from .form import Record, Resident, checked, faulty
from .streamer import damaged

DESCRIPTION = "store.json"
WEIGHTS = "weights.bin"
FORMAT = 3


def layout() -> dict[str, Any]:
    """Return what prepared layers depend on besides the model: they are read by nobody else's."""
    return {
        "format": FORMAT,
        "rows of a block": ROWS,
        "processor": platform.machine(),
        "byte order": sys.byteorder,
        "torch": torch.__version__.partition("+")[0],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A store that is open: its records are known, none is read yet."""

    folder: Path
    device: str = "cpu"
    """The type of the device that it is for."""
    digest: str
    """Of its description, which has the checksum of each tensor."""
    storage: Storage
    model: dict[str, Any]
    """What the builder said of the model; nothing here reads it."""
    resident: Record
    layers: tuple[Record, ...]
    """The first record of each."""
    mlp: tuple[tuple[tuple[Record, ...], tuple[Record, ...]], ...]
    """For each layer the blocks of its up and of its down; none where its first record holds all of it."""
    experts: tuple[tuple[tuple[Record, Record], ...], ...]
    """For each layer those of its experts, up and down; none for a layer with one MLP."""
    head: tuple[Record, ...]
    """Blocks of rows of the output matrix, all of one size; the last is filled up with zeros."""
    table: tuple[Record, ...]
    """The token table's blocks; those of the head where it is tied."""

    @property
    def schedule(self) -> tuple[Record, ...]:
        """The records of a step, in order."""
        layers = ((first, *ups, *downs) for first, (ups, downs) in zip(self.layers, self.mlp, strict=True))
        return (*(record for layer in layers for record in layer), *self.head)

    @property
    def records(self) -> tuple[Record, ...]:
        """All records, each once."""
        experts = (record for layer in self.experts for expert in layer for record in expert)
        return (self.resident, *self.schedule, *experts, *(() if self.table == self.head else self.table))

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return sum(record.nbytes for record in self.records)

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS


def kinds(store: Store, config: ModelConfig) -> list[Hashable]:
    """Return for each record of the schedule what it is of; records of one kind have one form."""
    of_layers = (
        (layer, place)
        for layer, (ups, downs) in zip(config.layers, store.mlp, strict=True)
        for place in ("first", *("up" for _ in ups), *("down" for _ in downs))
    )
    return [*of_layers, *("head" for _ in store.head)]


def is_store(path: Path) -> bool:
    """Return whether a path is the folder of a store."""
    return (path / DESCRIPTION).is_file()


def described(
    storage: Storage,
    model: dict[str, Any],
    resident: Record,
    layers: Sequence[Record],
    mlp: Sequence[Sequence[Sequence[Record]]],
    experts: Sequence[Sequence[Sequence[Record]]],
    head: Sequence[Record],
    table: Sequence[Record] | None,
    *,
    device: str = "cpu",
) -> str:
    """Return the text of a store's description; `table` is None where it is the head."""
    parts = {
        "layout": layout(),
        "device": device,
        "storage": storage.value,
        "model": model,
        "resident": as_json(resident),
        "layers": [as_json(each) for each in layers],
        "mlp": [[[as_json(each) for each in part] for part in layer] for layer in mlp],
        "experts": [[[as_json(each) for each in expert] for expert in layer] for layer in experts],
        "head": [as_json(each) for each in head],
        "table": None if table is None else [as_json(each) for each in table],
    }
    return json.dumps({"sha256": _digest(parts), **parts}, indent=1, allow_nan=False)


def open_store(folder: Path) -> Store:
    """Open a store, reading only what it says of itself.

    Raises `CheckpointError` for a description that is damaged, a file of another size, and a store that was built for
    another processor, torch or version.
    """
    path = folder / DESCRIPTION
    try:
        parts = json.loads(path.read_bytes())
        found = parts.pop("sha256")
        if found != _digest(parts):
            raise ValueError("its digest is another")
        device = parts.get("device", "cpu")
        _check_layout(folder, {**parts["layout"]}, {**parts["model"]}, parts["storage"], device)
        head = _matrices(parts["head"])
        store = Store(
            folder=folder,
            device=device,
            digest=found,
            storage=Storage(parts["storage"]),
            model={**parts["model"]},
            resident=checked(parts["resident"], Resident),
            layers=tuple(checked(each, Layer) for each in parts["layers"]),
            mlp=tuple((_matrices(ups), _matrices(downs)) for ups, downs in parts["mlp"]),
            experts=tuple(tuple((up, down) for up, down in map(_matrices, layer)) for layer in parts["experts"]),
            head=head,
            table=head if parts["table"] is None else _matrices(parts["table"]),
        )
        if device not in ("cpu", "cuda"):
            raise ValueError(f"its device is {device!r}; it must be cpu or cuda")
        if not len(store.layers) == len(store.mlp) == len(store.experts):
            raise ValueError(f"it has {len(store.layers)} layers, {len(store.mlp)} MLPs, {len(store.experts)} mixtures")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}; is {folder} a store?") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); build the store again") from None
    end = max(record.offset + record.nbytes for record in store.records)
    try:
        size = store.weights.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{store.weights} cannot be read: {error.strerror}; build the store again") from None
    if size != end:
        raise CheckpointError(f"{store.weights} has {size:,} bytes; it must have {end:,}: build the store again")
    return store


def check(store: Store, *, direct: bool = True) -> None:
    """Read all records and compare checksums; raises `CheckpointError` naming the first tensor that is damaged."""
    file = DirectFile(store.weights, direct=direct)
    buffer = aligned_buffer(max(record.nbytes for record in store.records))
    try:
        for record in store.records:
            file.read_into(buffer[: record.nbytes], record.offset, record.name)
            if fault := faulty(record, buffer):
                raise damaged(file, record, fault)
    finally:
        file.close()


def as_json(record: Record) -> dict[str, Any]:
    """Return a record as JSON has it."""
    return {"name": record.name, "offset": record.offset, "nbytes": record.nbytes, "form": record.form}


def _matrices(descriptions: Any) -> tuple[Record, ...]:
    if not isinstance(descriptions, list):
        raise ValueError("it lists what are no records")
    return tuple(checked(each, Matrix) for each in descriptions)


def differing_layout(there: dict[str, Any]) -> str | None:
    """Return what a store was built for that is otherwise here, in words; None where nothing is."""
    here = layout()
    wrong = next((key for key in here if there.get(key) != here[key]), None)
    return None if wrong is None else f"built for {wrong} {there.get(wrong)!r}; here it is {here[wrong]!r}"


def _check_layout(folder: Path, there: dict[str, Any], model: dict[str, Any], storage: str, device: str) -> None:
    wrong = differing_layout(there)
    if wrong is not None:
        remedy = _rebuild(folder, model, storage, device)
        raise CheckpointError(f"{folder} was {wrong}: {remedy}")


def check_device(store: Store, device: torch.device) -> None:
    """Raise `CheckpointError`, which has the command that makes another store, for one of another type of device."""
    if store.device != device.type:
        remedy = _rebuild(store.folder, store.model, store.storage.value, device.type)
        raise CheckpointError(f"{store.folder} was built for {store.device}; it is to run on {device}: {remedy}")


def _rebuild(folder: Path, model: dict[str, Any], storage: str, device: str) -> str:
    command = f"twinfer offload build {model.get('name', 'MODEL')} {folder} --storage {storage}"
    return f"remove it and run {command}" + ("" if device == "cpu" else f" --device {device}")


def _digest(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
