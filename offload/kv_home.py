"""Where keys and values lie that the memory budget has no room for: the first bytes in DRAM, the others in a file."""

from .copies import Copies
from .kv_file import KvFile


class KvHome:
    """A run of bytes, of which no range that is asked for lies on both sides of the border.

    On a GPU the DRAM is pinned, and copied from and to directly (`part`).
    """

    def __init__(self, file: KvFile | None, dram_bytes: int, copies: Copies) -> None:
        self._file, self._border, self._copies = file, dram_bytes, copies
        self._memory = copies.host_buffer(dram_bytes) if dram_bytes else memoryview(b"")

    def part(self, offset: int, nbytes: int) -> memoryview | None:
        """Return the memory of a range in DRAM; None for one in the file."""
        return self._memory[offset : offset + nbytes] if offset < self._border else None

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill a buffer of whole pages; raises `CheckpointError` where the disk fails."""
        there = self.part(offset, len(buffer))
        if there is not None:
            buffer[:] = there
        else:
            self._on_disk.read_into(buffer, offset - self._border, what)

    def write_from(self, buffer: memoryview, offset: int, what: str) -> None:
        """Write a buffer of whole pages; raises `RequestError` where the disk is full or fails."""
        there = self.part(offset, len(buffer))
        if there is not None:
            there[:] = buffer
        else:
            self._on_disk.write_from(buffer, offset - self._border, what)

    def close(self) -> None:
        """Give up all of it; closing twice does nothing."""
        if self._file is not None:
            self._file.close()
        if len(self._memory):
            self._copies.free(self._memory)
            self._memory = memoryview(b"")

    @property
    def _on_disk(self) -> KvFile:
        assert self._file is not None
        return self._file
