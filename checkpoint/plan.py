"""Which tensors of a file fill which weights of a model: a family's table matched with the file, strictly.

Strict means that every tensor of the file is used or listed as ignorable, every weight is filled, and every shape is
the config's. The check reads names and shapes only.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..spec.config import Head, ModelConfig
from ..spec.errors import WeightError
from ..spec.shapes import Shapes, embedding_shapes, head_shapes, layer_shapes
from .table import Experts, Heads, Stored, Table

_PROJECTION = "projection.weight_NI"
_TOKENS = "token_VW"
_POSITIONS = "position_PM"

_MOST_MISSING = 1000
"""Tensors to claim beyond as many as a file has; a damaged config may ask for billions."""


class TensorStore(Protocol):
    """Tensors by name: in a file, or of a live module."""

    @property
    def where(self) -> str:
        """The file or folder, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def tensor_table(self) -> bytes:
        """Return all that the file says of its tensors besides their values, as it stands there."""
        ...

    def unreadable(self, name: str) -> str | None:
        """Why the tensor cannot be read as floats, told from the header alone; None if it can."""
        ...

    def read(self, name: str) -> Tensor:
        """The tensor, in the file's own float dtype or float32; it may share memory with the file."""
        ...

    def read_slice(self, name: str, cuts: tuple[slice, ...]) -> Tensor:
        """Read a part of the tensor, one range for each dimension, and no more than the file's form requires."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """What a model holds that no file does, for it follows from the config: by weight name, per part.

    Each is a function that makes it, so that nothing of a config's sizes is made before a file is known to have them.
    """

    layers: Sequence[Mapping[str, Callable[[], Tensor]]]
    """For each layer: rotary frequencies and ALiBi slopes, float64, and gains that are all 1."""
    head: Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How to fill some of a part's weights from a tensor of a file, or from several that are its rows."""

    names: tuple[str, ...]
    """As the file has them."""
    stored: Stored
    fills: Mapping[str, int]
    """Each weight, and how many rows are its own."""
    skip: int = 0
    """Rows at the tensor's beginning that belong to nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything to be read, part by part."""

    embedding: tuple[Reading, ...]
    layers: tuple[tuple[Reading, ...], ...]
    head: tuple[Reading, ...]


def plan(table: Table, config: ModelConfig, store: TensorStore, buffers: Buffers, first_position: int = 0) -> Plan:
    """Match a file's tensors with the config's weights. Raises `WeightError` naming what does not fit.

    `first_position` is the row of the table of positions that belongs to a sequence's first token.
    """
    names = _names_in(table, store)
    claimed: dict[str, tuple[int, ...]] = {}

    def part(
        entries: tuple[Stored, ...], shapes: Shapes, made: Collection[str], prefix: str = "", head_size: int = 0
    ) -> tuple[Reading, ...]:
        shapes = {name: shape for name, shape in shapes.items() if name not in made}
        readings = []
        for entry in _there(entries, names, prefix):
            wanted = {target: shapes.pop(target) for target in entry.fills if target in shapes}
            if not wanted:
                continue
            skip = first_position if _POSITIONS in wanted else 0
            fills = {target: shape[0] for target, shape in wanted.items()}
            shape = _kept_shape(list(wanted.values()), entry, skip, head_size)
            most = len(names) + _MOST_MISSING - len(claimed)
            count = min(wanted[entry.fills[0]][0] if entry.experts else sum(fills.values()) // max(1, head_size), most)
            own = _numbered(prefix + entry.name, count)
            claimed.update(dict.fromkeys(own, shape))
            if len(claimed) >= len(names) + _MOST_MISSING:
                raise _missing(config, store, names, claimed)
            there = tuple(names.get(name, name) for name in own)
            readings.append(Reading(names=there, stored=entry, fills=fills, skip=skip))
        assert not shapes, f"the {config.family} table does not say where {', '.join(shapes)} come from"
        return tuple(readings)

    result = Plan(
        embedding=part(table.embedding, embedding_shapes(config), ()),
        layers=tuple(
            part(
                table.layer,
                layer_shapes(layer, config.hidden),
                buffers.layers[index],
                table.layers.format(layer=index),
                layer.attention.head_size,
            )
            for index, layer in enumerate(config.layers)
        ),
        head=part(table.head, head_shapes(config), buffers.head),
    )
    _check(table, config, store, names, claimed)
    return result


def _kept_shape(shapes: list[tuple[int, ...]], entry: Stored, skip: int, head_size: int) -> tuple[int, ...]:
    """The shape that the file's tensor must have to hold weights of these shapes."""
    if entry.experts is not None:
        return _kept_shape_of_experts(shapes, entry)
    rows = sum(shape[0] for shape in shapes)
    if entry.heads is Heads.SHARED or "{head}" in entry.name:
        return (head_size,)
    if entry.heads is Heads.STACKED:
        return rows // head_size, head_size
    if entry.one_row:
        return 1, rows
    stacked = (rows + skip, *shapes[0][1:])
    return stacked[::-1] if entry.transposed else stacked


def _kept_shape_of_experts(shapes: list[tuple[int, ...]], entry: Stored) -> tuple[int, ...]:
    """Return the same for maps of experts: [E, N, I], with the rows of several after each other."""
    count, inputs = shapes[0][0], shapes[0][2:]
    own = (sum(shape[1] for shape in shapes), *inputs)
    own = own[::-1] if entry.transposed else own
    match entry.experts:
        case Experts.APART:
            return own
        case Experts.FLAT:
            return count * own[0], *own[1:]
    return count, *own


def _there(entries: tuple[Stored, ...], names: Mapping[str, str], prefix: str) -> list[Stored]:
    """Return the entries without those that the file lacks and whose weights it has in another form."""

    def here(entry: Stored) -> bool:
        return any(prefix + entry.name.replace("{expert}", str(expert)) in names for expert in (0, 1))

    found = {target for entry in entries if here(entry) for target in entry.fills}
    return [entry for entry in entries if here(entry) or not found.intersection(entry.fills)]


def _numbered(name: str, count: int) -> tuple[str, ...]:
    """The name, or one for each head or expert."""
    letters = next((each for each in ("{head}", "{expert}") if each in name), None)
    return (name,) if letters is None else tuple(name.replace(letters, str(number)) for number in range(count))


def _check(
    table: Table,
    config: ModelConfig,
    store: TensorStore,
    names: Mapping[str, str],
    claimed: Mapping[str, tuple[int, ...]],
) -> None:
    if not claimed.keys() <= names.keys():
        raise _missing(config, store, names, claimed)
    ignored = set(_ignored_names(table, len(config.layers))) | _repeated_head(table, config, store, names)
    begins = tuple(entry.name[:-1] for entry in table.ignorable if entry.name.endswith("*"))
    left = [name for name in names if name not in claimed and name not in ignored]
    surplus = [names[name] for name in left if not name.startswith(begins)]
    if surplus:
        raise WeightError(
            f"{store.where} holds {_some(surplus)}, which a {config.family} model of its config does not have; "
            "the config belongs to another model, or the file is not a plain language model"
        )
    for name, shape in claimed.items():
        found = tuple(store.shapes[names[name]])
        if found != shape and len(shape) == 3 and found[1:] == shape[1:]:
            raise WeightError(
                f"{store.where}: {names[name]} holds {found[0]} experts; by its config it must hold {shape[0]}"
            )
        if found != shape:
            raise WeightError(
                f"{store.where}: {names[name]} has shape {list(found)}; by its config it must be {list(shape)}"
            )
        _check_readable(store, names[name])


def _check_readable(store: TensorStore, name: str) -> None:
    if reason := store.unreadable(name):
        raise WeightError(f"{store.where}: {name} is {reason}; use the checkpoint that was not quantized so")


def _missing(
    config: ModelConfig, store: TensorStore, names: Mapping[str, str], claimed: Mapping[str, tuple[int, ...]]
) -> WeightError:
    """The error for a file that does not hold all that is claimed."""
    return WeightError(
        f"{store.where} lacks {_some([name for name in claimed if name not in names])}, which a {config.family} model "
        "of its config has; fetch it again, or correct its config"
    )


def _repeated_head(table: Table, config: ModelConfig, store: TensorStore, names: Mapping[str, str]) -> set[str]:
    """A tied head that the file holds all the same. Raises `WeightError` if it is not the token table."""
    heads = [names[entry.name] for entry in table.head if _PROJECTION in entry.fills and entry.name in names]
    tables = [names[entry.name] for entry in table.embedding if _TOKENS in entry.fills and entry.name in names]
    if not (config.head is Head.TIED and heads and tables):
        return set()
    (head,), (token_table,) = heads, tables
    for name in (head, token_table):
        _check_readable(store, name)
    if store.shapes[head] != store.shapes[token_table] or not _same_bits(store.read(head), store.read(token_table)):
        raise WeightError(
            f"{store.where}: {head} differs from {token_table}, but by its config the head is the token table; "
            "set tie_word_embeddings to false if the head is its own"
        )
    return {entry.name for entry in table.head if _PROJECTION in entry.fills}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    same_place = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return one.dtype == other.dtype and (same_place or torch.equal(one.view(torch.uint8), other.view(torch.uint8)))


def _names_in(table: Table, store: TensorStore) -> dict[str, str]:
    """The file's names by those that the table uses."""
    names: dict[str, str] = {}
    for name in store.shapes:
        bare = name.removeprefix(table.prefix)
        for older, newer in table.older_starts:
            if bare.startswith(older):
                bare = newer + bare.removeprefix(older)
        for older, newer in table.older_ends:
            if bare.endswith(older):
                bare = bare.removesuffix(older) + newer
        if bare in names:
            raise WeightError(f"{store.where} holds both {names[bare]} and {name}; only one of them can be the weight")
        names[bare] = name
    return names


def _ignored_names(table: Table, layers: int) -> Iterator[str]:
    for entry in table.ignorable:
        yield from {entry.name.format(layer=layer) for layer in range(layers)}


def _some(names: list[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
