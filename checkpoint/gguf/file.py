"""A GGUF file: metadata, and tensors that are de-quantized one at a time.

The `gguf` library reads the header and knows the quantized formats. What it does not check is checked here: that
everything the header speaks of lies within the file, and that each tensor has aligned bytes of its own there.

GGUF writes shapes with the fastest axis first; here they are [outputs, inputs] as everywhere else.
"""

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from ...spec.errors import CheckpointError, TwinferError

_ROWS = 2048

TOKEN_TYPES = "token_types.weight"
"""A table, of which converters drop the first axis where it has a single row."""

SHARED_GATE = "ffn_gate_inp_shexp.weight"
"""The end of a linear map's name whose only row converters write without its axis."""

REMEDY = "fetch the file again"


class _Header(gguf.GGUFReader):
    """The library's reader over a plain array: a read past the end raises, and reading is several times faster.

    The file is mapped copy-on-write, so that tensors made from it are writable in memory and the file stays as it is.
    """

    def __init__(self, path: Path):
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        super().__init__(path, "c")

    def forget_pages(self) -> None:
        """Let the system drop the pages read so far, which it counts as our memory; it can read them again."""
        mapping = getattr(self.data, "_mmap", None)
        if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if self._bytes is None:
            self._bytes = np.asarray(self.data)
        kind = np.dtype(dtype)
        end = int(offset) + int(count) * kind.itemsize
        if end > self._bytes.size:
            raise EOFError(f"it should reach byte {end}, but ends at byte {self._bytes.size}")
        values = self._bytes[int(offset) : end].view(kind)
        order = self.byte_order if override_order is None else override_order
        return values if order == "I" else values.view(kind.newbyteorder(order))

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        """Check where the tensors lie before the library, whose arithmetic wraps at 64 bits, looks for them there."""
        placed = [_placed(field) for field in fields]
        _check_places(placed, int(self.alignment), self.data.size - int(start_offs))
        super()._build_tensors(int(start_offs), fields)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where a tensor's bytes lie, counted from where the data begin."""

    name: str
    begin: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + self.size


def _placed(field: Any) -> _Placed:
    """What the header says of one tensor, in whole numbers that cannot wrap."""
    _, name, _, dims, kind, offset = field.parts
    elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
    size = math.prod(int(length) for length in dims) * block_bytes // elements
    return _Placed(str(bytes(name), encoding="utf-8"), int(offset[0]), size)


def _check_places(placed: Sequence[_Placed], alignment: int, there: int) -> None:
    """Raise `ValueError` naming the tensor that is not aligned, not within the `there` bytes, or over another one."""
    for tensor in placed:
        if tensor.begin % alignment:
            raise ValueError(f"{tensor.name} begins at byte {tensor.begin} of the data, no multiple of {alignment}")
        if tensor.end > there:
            raise ValueError(
                f"{tensor.name} lies at bytes {tensor.begin} to {tensor.end} of the data, of which there are {there}"
            )
    filled = sorted((tensor for tensor in placed if tensor.size), key=lambda tensor: tensor.begin)
    for before, tensor in pairwise(filled):
        if before.end > tensor.begin:
            raise ValueError(
                f"{before.name} and {tensor.name} overlap: bytes {before.begin} to {before.end} of the data, and "
                f"{tensor.begin} to {tensor.end}"
            )


class GgufFile:
    """A `TensorStore` over a GGUF file. Raises `CheckpointError` for a file that is damaged or not GGUF."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._header = _read_header(path)
        self._tensors = {tensor.name: tensor for tensor in self._header.tensors}
        shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in self._header.tensors}
        if len(shapes.get(TOKEN_TYPES, ())) == 1:
            shapes[TOKEN_TYPES] = (1, *shapes[TOKEN_TYPES])
        shapes |= {name: (1, *shape[-1:]) for name, shape in shapes.items() if name.endswith(SHARED_GATE)}
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    def take_metadata(self) -> dict[str, Any]:
        """Every metadata value by its key, as plain Python numbers, strings and lists.

        To be called once: the library's form of them, an array for each token of the vocabulary, is let go here.
        """
        assert self._header.fields, "the metadata have been taken"
        try:
            values = {key: field.contents() for key, field in self._header.fields.items()}
        except Exception as error:  # the library raises whatever its first step over nonsense happens to raise
            raise CheckpointError(f"{self.where} holds metadata that cannot be read ({error}); {REMEDY}") from None
        self._header.fields.clear()
        return values

    def tensor_table(self) -> bytes:
        return b"".join(part.tobytes() for tensor in self._tensors.values() for part in tensor.field.parts)

    def read(self, name: str) -> Tensor:
        tensor, shape = self._tensors[name], self.shapes[name]
        if len(tensor.shape) < 2:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).reshape(shape)
        return self._dequantized(tensor, shape, tensor.data)

    def read_slice(self, name: str, cuts: tuple[slice, ...]) -> Tensor:
        """Read the rows, and of their columns the blocks of quantized values that hold them."""
        tensor, shape = self._tensors[name], self.shapes[name]
        if len(tensor.shape) < 2:
            return self.read(name)[cuts]
        *rows, columns = (range(size)[cut] for size, cut in zip(shape, cuts, strict=True))
        block, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        first, end = columns.start // block, -(-columns.stop // block)
        per_block = tensor.data.shape[-1] * block // shape[-1]
        taken = (*(slice(each.start, each.stop) for each in rows), slice(first * per_block, end * per_block))
        out = self._dequantized(tensor, (*map(len, rows), (end - first) * block), tensor.data[taken])
        return out[..., columns.start - first * block : columns.stop - first * block]

    def _dequantized(self, tensor: Any, shape: tuple[int, ...], data: Any) -> Tensor:
        """Read some rows at a time: the library's arithmetic takes several times the memory of its result."""
        out = np.empty(shape, np.float32)
        for matrix in np.ndindex(shape[:-2]):
            for first in range(0, shape[-2], _ROWS):
                rows = (*matrix, slice(first, first + _ROWS))
                out[rows] = dequantize(data[rows], tensor.tensor_type)
        self._header.forget_pages()
        return torch.from_numpy(out)

    def unreadable(self, name: str) -> str | None:
        kind = self._tensors[name].tensor_type
        _, size = gguf.GGML_QUANT_SIZES[kind]
        try:
            dequantize(np.zeros(size, np.uint8), kind)  # one block tells whether the library knows the format
        except NotImplementedError:
            return f"kept as {kind.name}, which cannot be de-quantized here; F16, Q8_0 and Q4_K can, for example"
        return None


def _read_header(path: Path) -> _Header:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'; {REMEDY}")
        header = _Header(path)
    except TwinferError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the library raises whatever its first step over nonsense happens to raise
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is truncated or corrupt: {reason}; {REMEDY}") from None
    if header.endianess is not gguf.GGUFEndian.LITTLE:
        raise CheckpointError(f"{path} is a big-endian GGUF file; convert it to little-endian with gguf-convert-endian")
    return header
