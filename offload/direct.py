"""A file read past the system's page cache, into memory that is aligned for it.

Weights that are used once a step gain nothing from a cache that is smaller than they are, and under a memory limit the
cache counts. Where the file system knows no direct reads (tmpfs), the file is read through the cache, which is then
told to forget what was read: `DirectFile.direct` says which it is.
"""

import mmap
import os
from collections.abc import Callable
from pathlib import Path

from ..spec.errors import CheckpointError
from .form import PAGE

_DIRECT: int = getattr(os, "O_DIRECT", 0)

Read = Callable[[int, list[memoryview], int], int]
"""`os.preadv`, or what a test puts in its place."""


def aligned_buffer(nbytes: int) -> memoryview:
    """Return that much writable memory, beginning on a page; the system takes pages as they are first written."""
    return memoryview(mmap.mmap(-1, nbytes))


def opened(path: Path, flags: int, *, direct: bool = True) -> tuple[int, bool]:
    """Open a file directly if a direct read of its first page works, else as usual; returns which as well."""
    if direct and _DIRECT:
        try:
            descriptor = os.open(path, flags | _DIRECT)
        except FileNotFoundError:
            raise
        except OSError:
            descriptor = -1
        if descriptor >= 0:
            try:
                os.preadv(descriptor, [aligned_buffer(PAGE)], 0)
                return descriptor, True
            except OSError:
                os.close(descriptor)
    return os.open(path, flags), False


class DirectFile:
    """A file that is open for reading whole pages.

    Raises `CheckpointError` where it cannot be opened. Several threads may read at once.
    """

    def __init__(self, path: Path, *, direct: bool = True, read: Read = os.preadv) -> None:
        self.path = path
        self._read = read
        try:
            self._descriptor, self.direct = opened(path, os.O_RDONLY, direct=direct)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        self.nbytes = os.fstat(self._descriptor).st_size

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill a buffer of whole pages with what begins at a page of the file.

        Raises `CheckpointError`, naming `what` was read, where the file ends early or the disk fails.
        """
        done = 0
        while done < len(buffer):
            try:
                count = self._read(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {what} cannot be read: {error.strerror or error}") from None
            done += count
            if count == 0 or (self.direct and done % PAGE):
                raise CheckpointError(
                    f"{self.path}: {what} ends early, {done} of its {len(buffer)} bytes are there; the file is "
                    "truncated: build the store again"
                )
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
