"""A family's weight-name table: what each tensor in its files fills, and the strict check of a file against it.

Strict means that every tensor of the file is used or listed as ignorable, every weight is filled, and every shape is
the config's. The check reads names and shapes only.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..spec.config import Head, LayerConfig, ModelConfig
from ..spec.errors import WeightError
from ..spec.shapes import Shapes, embedding_shapes, head_shapes, layer_shapes, trained

_PROJECTION = "projection.weight_NI"
_TOKENS = "token_VE"


class TensorStore(Protocol):
    """Tensors on disk, by name."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def unreadable(self, name: str) -> str | None:
        """Why the tensor cannot be read as floats, told from the header alone; None if it can."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in the file's own float dtype or float32; it may share memory with the file."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a file, and the weights it fills.

    If it fills several, it holds them stacked along their outputs, in this order. Weights that the config does not
    ask for (a bias, in a model without) are not looked for.
    """

    name: str
    """In the file, with `{layer}` where the layer's number stands and without the family's prefix."""
    fills: tuple[str, ...]
    """Dotted names in the part's weights dataclass."""
    transposed: bool = False
    """Kept as [inputs, outputs]."""
    reorder: Callable[[Tensor, LayerConfig], Tensor] | None = None
    """Puts rows that the file keeps in an order of its own into ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ignorable:
    """Tensors that hold no weights, though files carry them."""

    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    embedding: tuple[Stored, ...]
    layer: tuple[Stored, ...]
    head: tuple[Stored, ...]
    ignorable: tuple[Ignorable, ...] = ()
    prefix: str = ""
    """Stands before most names of some files, and before none of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to fill some of a part's weights from one tensor of a file."""

    name: str
    """The tensor's name as the file has it."""
    stored: Stored
    fills: Mapping[str, int]
    """Each weight, and how many rows of the tensor are its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to be read, part by part."""

    embedding: tuple[Reading, ...]
    layers: tuple[tuple[Reading, ...], ...]
    head: tuple[Reading, ...]


def plan(table: Table, config: ModelConfig, store: TensorStore) -> Plan:
    """Match a file's tensors with the config's weights. Raises `WeightError` naming what does not fit."""
    names = _without_prefix(table.prefix, store)
    claimed: dict[str, tuple[int, ...]] = {}

    def part(entries: tuple[Stored, ...], shapes: Shapes, layer: int | None = None) -> tuple[Reading, ...]:
        readings = []
        for entry in entries:
            wanted = {target: shapes.pop(target) for target in entry.fills if target in shapes}
            if wanted:
                name = entry.name if layer is None else entry.name.format(layer=layer)
                claimed[name] = _stacked_shape(list(wanted.values()), entry.transposed)
                fills = {target: shape[0] for target, shape in wanted.items()}
                readings.append(Reading(name=names.get(name, name), stored=entry, fills=fills))
        assert not shapes, f"the {config.family} table does not say where {', '.join(shapes)} come from"
        return tuple(readings)

    result = Plan(
        embedding=part(table.embedding, embedding_shapes(config)),
        layers=tuple(
            part(table.layer, trained(layer_shapes(layer, config.hidden)), index)
            for index, layer in enumerate(config.layers)
        ),
        head=part(table.head, head_shapes(config)),
    )
    _check(table, config, store, names, claimed)
    return result


def _check(
    table: Table,
    config: ModelConfig,
    store: TensorStore,
    names: Mapping[str, str],
    claimed: Mapping[str, tuple[int, ...]],
) -> None:
    missing = [name for name in claimed if name not in names]
    if missing:
        raise WeightError(
            f"{store.where} lacks {_some(missing)}, which a {config.family} model of its config has; "
            "fetch it again, or correct its config"
        )
    ignored = set(_ignored_names(table, len(config.layers))) | _repeated_head(table, config, store, names)
    surplus = [names[name] for name in names if name not in claimed and name not in ignored]
    if surplus:
        raise WeightError(
            f"{store.where} holds {_some(surplus)}, which a {config.family} model of its config does not have; "
            "the config belongs to another model, or the file is not a plain language model"
        )
    for name, shape in claimed.items():
        found = tuple(store.shapes[names[name]])
        if found != shape:
            raise WeightError(
                f"{store.where}: {names[name]} has shape {list(found)}; by its config it must be {list(shape)}"
            )
        if reason := store.unreadable(names[name]):
            raise WeightError(f"{store.where}: {names[name]} is {reason}; use the checkpoint that was not quantised so")


def _repeated_head(table: Table, config: ModelConfig, store: TensorStore, names: Mapping[str, str]) -> set[str]:
    """A tied head that the file holds all the same. Raises `WeightError` if it is not the token table."""
    heads = [names[entry.name] for entry in table.head if _PROJECTION in entry.fills and entry.name in names]
    tables = [names[entry.name] for entry in table.embedding if _TOKENS in entry.fills and entry.name in names]
    if not (config.head is Head.TIED and heads and tables):
        return set()
    (head,), (token_table,) = heads, tables
    if store.shapes[head] != store.shapes[token_table] or not _same_bits(store.read(head), store.read(token_table)):
        raise WeightError(
            f"{store.where}: {head} differs from {token_table}, but by its config the head is the token table; "
            "set tie_word_embeddings to false if the head is its own"
        )
    return {entry.name for entry in table.head if _PROJECTION in entry.fills}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _without_prefix(prefix: str, store: TensorStore) -> dict[str, str]:
    """The file's names by those that the table uses."""
    names: dict[str, str] = {}
    for name in store.shapes:
        bare = name.removeprefix(prefix)
        if bare in names:
            raise WeightError(f"{store.where} holds both {names[bare]} and {name}; only one of them can be the weight")
        names[bare] = name
    return names


def _stacked_shape(shapes: list[tuple[int, ...]], transposed: bool) -> tuple[int, ...]:
    stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return stacked[::-1] if transposed else stacked


def _ignored_names(table: Table, layers: int) -> Iterator[str]:
    for entry in table.ignorable:
        yield from {entry.name.format(layer=layer) for layer in range(layers)}


def _some(names: list[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
