"""Prepared weights as a record of bytes with a description, and back.

A record is a run of whole pages. Its tensors lie one after the other, each at a multiple of 64 bytes, as kernels want
them. The description is plain JSON: the named tuples by their names and fields, and for each tensor where it lies:

    {"kind": "Norm", "gain_M": {"name": "mlp_norm.gain_M", "dtype": "float32", "shape": [576], "offset": 128, ...}}

So a record is read into any buffer of its size, and what it holds are tensors that lie in that buffer.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiled.norms import Norm
from ..compiled.packing import Matrix
from ..compiled.weights import Layer, Rotations

PAGE = 4096
"""What records are aligned to, in the file and in memory: a multiple of what disks read directly."""

ALIGNMENT = 64
"""What tensors are aligned to within a record: a line of the caches, and the widest vector."""


class Resident(NamedTuple):
    """What stays in memory: the parts of a model that are small, or that every layer needs."""

    projection: Matrix | None
    """Of the embedding, where the table is not as wide as the hidden vector."""
    position_PM: Tensor | None
    type_YM: Tensor | None
    embedding_norm: Norm | None
    rotations: Rotations
    head_norm: Norm | None
    reduction: Matrix | None
    table_checksum_B: Tensor
    """For each block of the token table its CRC-32, int64: single blocks of it are looked up."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor of a record."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the record's beginning."""
    checksum: int
    """CRC-32 of its bytes."""

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Record:
    """A part of a model in a store's file."""

    name: str
    """Such as "layer 3", "layer 3, expert 7, up" or "head rows 0 to 4095"."""
    offset: int
    """Bytes from the file's beginning, a multiple of `PAGE`."""
    nbytes: int
    """A multiple of `PAGE`."""
    form: Any
    """The description, as JSON has it."""

    def tensors(self) -> list[Placed]:
        """Return its tensors in the order in which they lie."""
        return list(_placed(self.form))


def names_within(records: Sequence[Record], begin: int, nbytes: int) -> str:
    """Return the names of the records that lie in so many bytes of the file."""
    return " and ".join(
        each.name for each in records if each.offset < begin + nbytes and begin < each.offset + each.nbytes
    )


def pages(count: int) -> int:
    """Return a number of bytes, rounded up to whole pages.

    >>> pages(1), pages(4096), pages(4097)
    (4096, 4096, 8192)
    """
    return -(-count // PAGE) * PAGE


def written(part: Any, name: str, offset: int) -> tuple[Record, Iterator[bytes | memoryview]]:
    """Return the record of a part at an offset of the file, and its bytes, piece by piece.

    The tensors are of the CPU and contiguous, as prepared parts are.
    """
    pieces: list[bytes | memoryview] = []
    end = 0

    def place(tensor: Tensor, dotted: str) -> dict[str, Any]:
        nonlocal end
        raw = bytes_of(tensor)
        begin = -(-end // ALIGNMENT) * ALIGNMENT
        pieces.extend((bytes(begin - end), raw))
        end = begin + len(raw)
        return {
            "name": dotted,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "offset": begin,
            "crc32": zlib.crc32(raw),
        }

    form = _described(part, "", place)
    pieces.append(bytes(pages(end) - end))
    return Record(name, offset, pages(end), form), iter(pieces)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor of the CPU."""
    assert tensor.is_contiguous()
    flat = tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return memoryview(cast(Any, flat.numpy()))


def in_buffer(record: Record, buffer: memoryview | Tensor) -> Any:
    """Return the part that a record describes, its tensors lying in this buffer.

    Each has a storage of its own, so no tensor has an offset that a kernel could drop, and none is a view of another.
    Those in a device's memory do not keep it: whoever holds the buffer holds the part.
    """

    def found(placed: Placed) -> Tensor:
        if placed.nbytes == 0:
            device = buffer.device if isinstance(buffer, Tensor) else None
            return torch.empty(placed.shape, dtype=placed.dtype, device=device)
        if isinstance(buffer, Tensor):
            return lying_in(buffer, placed.offset, placed.dtype, placed.shape)
        raw = buffer[placed.offset : placed.offset + placed.nbytes]
        return torch.frombuffer(cast(Any, raw), dtype=placed.dtype).view(placed.shape)

    return rebuilt(record.form, found)


_storage_at: Callable[..., Any] = torch._C._construct_storage_from_data_pointer  # as torch's own CUDA graphs make them


def lying_in(
    buffer: Tensor, offset: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None
) -> Tensor:
    """Return the tensor that begins at a byte of a buffer, as a non-owning alias; contiguous unless strides are given.

    >>> buffer = torch.arange(8, dtype=torch.uint8)
    >>> lying_in(buffer, 4, torch.uint8, (2, 2)).tolist()
    [[4, 5], [6, 7]]
    """
    strides = tuple(strides or torch.empty(shape, device="meta").stride())
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = _storage_at(buffer.data_ptr() + offset, buffer.device, (last + 1) * dtype.itemsize)
    return torch.empty(0, dtype=dtype, device=buffer.device).set_(storage, 0, tuple(shape), strides)


def on_device(part: Any, device: torch.device) -> Any:
    """Return a part whose tensors lie on a device; those that do already are not copied."""
    return pytree.tree_map_only(Tensor, lambda each: each.to(device), part)


def rebuilt(form: Any, found: Callable[[Placed], Tensor]) -> Any:
    """Return what a description describes, its tensors as `found` has them."""
    if isinstance(form, list):
        return tuple(rebuilt(each, found) for each in form)
    if not isinstance(form, dict):
        return form
    if "kind" not in form:
        return found(_placed_tensor(form))
    fields = {name: rebuilt(each, found) for name, each in form.items() if name != "kind"}
    return _KINDS[form["kind"]](**fields)


def faulty(record: Record, buffer: memoryview) -> str | None:
    """Return the name of the first tensor whose bytes in a buffer are not those that were written; None if all are."""
    for placed in record.tensors():
        if zlib.crc32(buffer[placed.offset : placed.offset + placed.nbytes]) != placed.checksum:
            return placed.name
    return None


def checked(values: Any, root: type) -> Record:
    """Return the record that a description is of, whose part is a `root`; nothing of the file is read.

    Raises `ValueError` with what is wrong in any that `written` cannot have made.
    """
    known = isinstance(values, dict) and values.keys() == {"name", "offset", "nbytes", "form"}
    if not known or not isinstance(values["name"], str):
        raise ValueError("it lists what is no record")
    name, offset, nbytes = values["name"], values["offset"], values["nbytes"]
    if not (_is_count(offset) and _is_count(nbytes) and offset % PAGE == 0 == nbytes % PAGE):
        raise ValueError(f"{name} lies in {nbytes!r} bytes from {offset!r} on, which are not whole pages")
    if not _fits(values["form"], root, nbytes):
        raise ValueError(f"what it says of the tensors of {name} is not how a {root.__name__} is described")
    return Record(**values)


def _fits(form: Any, hint: Any, room: int) -> bool:
    """Return whether a value of this type can be described so, its tensors within a record of `room` bytes."""
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return any(_fits(form, each, room) for each in get_args(hint))
    if hint is Tensor:
        return _is_placed(form) and 0 <= _placed_tensor(form).nbytes <= room - form["offset"]
    if get_origin(hint) is tuple:
        (each, *_) = get_args(hint)
        return isinstance(form, list) and all(_fits(item, each, room) for item in form)
    if hint is int or hint is NoneType:  # whole numbers are counts and places
        return _is_count(form) if hint is int else form is None
    if hint is float:
        return type(form) in (float, int)
    fields = get_type_hints(hint)
    whole = isinstance(form, dict) and form.get("kind") == hint.__name__ and form.keys() == {"kind", *fields}
    return whole and all(_fits(form[name], each, room) for name, each in fields.items())


def _is_placed(form: Any) -> bool:
    if not isinstance(form, dict) or form.keys() != {"name", "dtype", "shape", "offset", "crc32"}:
        return False
    shape, counts = form["shape"], (form["offset"], form["crc32"])
    return (
        isinstance(form["name"], str)
        and isinstance(form["dtype"], str)
        and isinstance(getattr(torch, form["dtype"], None), torch.dtype)
        and isinstance(shape, list)
        and all(map(_is_count, (*shape, *counts)))
        and form["offset"] % ALIGNMENT == 0
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _described(value: Any, dotted: str, place: Callable[[Tensor, str], dict[str, Any]]) -> Any:
    if isinstance(value, Tensor):
        return place(value, dotted)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        prefix = f"{dotted}." if dotted else ""
        fields = {name: _described(getattr(value, name), f"{prefix}{name}", place) for name in value._fields}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_described(each, f"{dotted}.{index}", place) for index, each in enumerate(value)]
    assert value is None or isinstance(value, int | float), f"{dotted} is {value!r}"
    return value


def _placed(form: Any) -> Iterator[Placed]:
    if isinstance(form, list):
        for each in form:
            yield from _placed(each)
    elif isinstance(form, dict) and "kind" in form:
        for name, each in form.items():
            if name != "kind":
                yield from _placed(each)
    elif isinstance(form, dict):
        yield _placed_tensor(form)


def _placed_tensor(form: dict[str, Any]) -> Placed:
    return Placed(form["name"], getattr(torch, form["dtype"]), tuple(form["shape"]), form["offset"], form["crc32"])


def _kinds(hint: Any) -> dict[str, type]:
    """Return the named tuples that a type is made of, by their names."""
    inner = [kind for each in get_args(hint) for kind in _kinds(each).values()]
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        inner += [hint, *(kind for each in get_type_hints(hint).values() for kind in _kinds(each).values())]
    return {kind.__name__: kind for kind in inner}


_KINDS = _kinds(Layer) | _kinds(Resident) | _kinds(Matrix)
"""The named tuples that records hold; a description names no others."""
