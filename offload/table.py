"""The token table on the disk: the rows of a step's tokens, read one by one.

A step needs one row of the table for each token, so the table is neither kept nor streamed. Packed rows stand in blocks
of U (`compiled.packing`), which are read whole; what is read is a small table of the same form, in which the tokens
have other numbers:

    U = 16, tokens 35 and 3 are in blocks 2 and 0: these become blocks 1 and 0, and the tokens 19 and 3

A block's checksum is verified whenever it is read.
"""

import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..compiled.packing import ROWS, Matrix
from ..spec.config import Storage
from .direct import DirectFile, aligned_buffer
from .form import PAGE, Placed, Record, bytes_of, pages
from .streamer import damaged

_LEAST_BLOCKS = 2
"""Blocks of the smallest table that is made: programs are compiled for any number of at least 2."""

_SEVERAL = 8
"""So many blocks are read by several threads at once."""

_THREADS = 4


class DiskTable:
    """Looks up rows of the token table; `checksum_B` has one CRC-32 for each block."""

    def __init__(self, file: DirectFile, records: Sequence[Record], storage: Storage, checksum_B: Tensor) -> None:
        self._file, self._records = file, records
        self._rows = 1 if storage is Storage.FLOAT32 else ROWS
        self._checksums = checksum_B.tolist()
        self._blocks = len(self._checksums) // len(records)
        self._placed = {placed.name: placed for placed in records[0].tensors() if placed.name != "bias_N"}
        self._outputs: int = records[0].form["outputs"]
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(_THREADS)

    def rows(self, tokens: Sequence[int]) -> tuple[Matrix, list[int]]:
        """Return a table that holds the rows of these tokens, and the tokens' numbers in it.

        Raises `CheckpointError` for a block that cannot be read or is damaged.
        """
        wanted = list(dict.fromkeys(token // self._rows for token in tokens))
        made = {name: self._empty(placed, max(_LEAST_BLOCKS, len(wanted))) for name, placed in self._placed.items()}
        raw = {name: bytes_of(tensor) for name, tensor in made.items()}

        def fetch(place: int) -> None:
            self._fetch(wanted[place], {name: self._part(each, place, name) for name, each in raw.items()})

        if len(wanted) >= _SEVERAL:
            list(self._pool.map(fetch, range(len(wanted))))
        else:
            for place in range(len(wanted)):
                fetch(place)
        places = {block: place for place, block in enumerate(wanted)}
        numbers = [places[token // self._rows] * self._rows + token % self._rows for token in tokens]
        scales = [made.get(name) for name in ("scale_N", "scale_BGU", "min_BGU")]
        return Matrix(made["word"], *scales, None, self._outputs), numbers

    def close(self) -> None:
        """End the threads; closing twice does nothing."""
        self._pool.shutdown()

    def _empty(self, placed: Placed, blocks: int) -> Tensor:
        return torch.zeros(blocks * placed.shape[0] // self._blocks, *placed.shape[1:], dtype=placed.dtype)

    def _part(self, raw: memoryview, place: int, name: str) -> memoryview:
        size = self._placed[name].nbytes // self._blocks
        return raw[place * size : (place + 1) * size]

    def _fetch(self, block: int, targets: dict[str, memoryview]) -> None:
        """Read one block's parts where they belong."""
        record = self._records[block // self._blocks]
        checksum = 0
        for name, target in targets.items():
            begin = record.offset + self._placed[name].offset + block % self._blocks * len(target)
            first = begin // PAGE * PAGE
            scratch = self._scratch(pages(begin + len(target)) - first)
            self._file.read_into(scratch, first, record.name)
            target[:] = scratch[begin - first : begin - first + len(target)]
            checksum = zlib.crc32(target, checksum)
        if checksum != self._checksums[block]:
            raise damaged(self._file, record, f"block {block % self._blocks} of word")

    def _scratch(self, nbytes: int) -> memoryview:
        """Return memory of this thread, for one read."""
        held: memoryview | None = getattr(self._local, "scratch", None)
        if held is None or len(held) < nbytes:
            held = self._local.scratch = aligned_buffer(nbytes)
        return held[:nbytes]
