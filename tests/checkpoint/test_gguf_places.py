"""Where a GGUF file says that its tensors lie: each has aligned bytes of its own within the file, or it is refused."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinfer.checkpoint import open_model
from twinfer.spec.errors import CheckpointError, TwinferError

from .test_gguf import tiny, write

MOVED, OTHER = "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
    write(path, tiny(num_hidden_layers=1))
    return path


def offset_of(path: Path, name: str) -> int:
    return next(int(t.field.parts[5][0]) for t in gguf.GGUFReader(path).tensors if t.name == name)


def moved(path: Path, offset: int) -> Path:
    """A copy in which the header says that `MOVED` begins at this byte of the data."""
    reader = gguf.GGUFReader(path)
    field = next(tensor.field for tensor in reader.tensors if tensor.name == MOVED)
    place = field.offset + sum(int(part.nbytes) for part in field.parts[:5])
    content = bytearray(path.read_bytes())
    content[place : place + 8] = struct.pack("<Q", offset)
    copy = path.with_name("moved.gguf")
    copy.write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (lambda path: 2**64 - 32, f"{MOVED} lies at bytes 18446744073709551584 to 18446744073709559776 of the data"),
        (lambda path: 2**63, f"{MOVED} lies at bytes 9223372036854775808 to"),
        (lambda path: 2**40, f"{MOVED} lies at bytes 1099511627776 to"),
        (lambda path: offset_of(path, MOVED) + 4, "no multiple of 32"),
        (lambda path: 2**64 - 4, "no multiple of 32"),
        (lambda path: offset_of(path, OTHER), f"{MOVED} and {OTHER} overlap"),
        (lambda path: offset_of(path, OTHER) - 32, f"{MOVED} and {OTHER} overlap"),
    ],
    ids=["wraps to the header", "2**63", "past the end", "unaligned", "unaligned and wraps", "shared", "half shared"],
)
def test_tensors_that_lie_elsewhere_are_named(whole: Path, offset: Callable[[Path], int], message: str) -> None:
    """A tensor read from other bytes than its own would answer with other tokens, and nobody would know."""
    path = moved(whole, offset(whole))
    with pytest.raises(CheckpointError) as caught:
        open_model(str(path))
    assert message in str(caught.value)
    assert "fetch the file again" in str(caught.value)


@given(offset=st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 2**10).map(lambda blocks: 32 * blocks)))
def test_no_offset_but_its_own_is_read(whole: Path, offset: int) -> None:
    """The bytes of a file without gaps have one owner each, so every other offset is refused."""
    own = offset_of(whole, MOVED)
    path = moved(whole, offset)
    if offset == own:
        open_model(str(path))
        return
    with pytest.raises(TwinferError):
        open_model(str(path))


def test_a_shape_whose_bytes_wrap_is_refused(whole: Path) -> None:
    """2**62 rows of 4 elements of 4 bytes are 2**66 bytes, which a 64-bit product would call none."""
    reader = gguf.GGUFReader(whole)
    field = next(tensor.field for tensor in reader.tensors if tensor.name == MOVED)
    place = field.offset + sum(int(part.nbytes) for part in field.parts[:3])
    content = bytearray(whole.read_bytes())
    content[place : place + 16] = struct.pack("<2Q", 4, 2**62)
    copy = whole.with_name("wrapped.gguf")
    copy.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{MOVED} lies at bytes"):
        open_model(str(copy))
