"""Keys and values on the disk: a file without a name, which goes with the process that made it, however that ends.

It is read and written past the page cache where the file system allows that, as weights are: under a memory limit the
cache counts, and would hold what was moved away to make room.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from ..spec.errors import CheckpointError, RequestError
from .direct import Read, opened
from .form import PAGE

Write = Callable[[int, list[memoryview], int], int]
"""`os.pwritev`, or what a test puts in its place."""


class KvFile:
    """A nameless file of so many bytes in a folder, in which whole pages are written and read.

    Raises `RequestError` where the folder cannot be written to or has less room than that.
    """

    def __init__(self, folder: Path, nbytes: int, *, read: Read = os.preadv, write: Write = os.pwritev) -> None:
        self._folder, self._read, self._write = folder, read, write
        try:
            free = shutil.disk_usage(folder).free
            if free < nbytes:
                raise RequestError(
                    f"{folder} has {free:,} bytes free; keys and values beyond the memory budget take {nbytes:,}: make "
                    "room, give a larger budget, or fewer or shorter sequences"
                )
            descriptor, name = tempfile.mkstemp(prefix=".twinfer-kv-", dir=folder)
            try:
                self._descriptor, self.direct = opened(Path(name), os.O_RDWR)
            finally:
                os.close(descriptor)
                os.unlink(name)
            self._end = weakref.finalize(self, os.close, self._descriptor)
            os.ftruncate(self._descriptor, nbytes)
        except OSError as error:
            raise self._unwritable(error) from None

    def read_into(self, buffer: memoryview, offset: int, what: str) -> None:
        """Fill a buffer of whole pages; raises `CheckpointError` where the disk fails."""
        self._all(self._read, buffer, offset, what)

    def write_from(self, buffer: memoryview, offset: int, what: str) -> None:
        """Write a buffer of whole pages; raises `RequestError` where the disk is full or fails."""
        try:
            self._all(self._write, buffer, offset, what)
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Close it, with which its bytes are gone; closing twice does nothing."""
        self._end()

    def _all(self, call: Read | Write, buffer: memoryview, offset: int, what: str) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = call(self._descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                if call is self._write:
                    raise
                raise CheckpointError(f"{what} cannot be read back from {self._folder}: {error.strerror}") from None
            whole = count - count % PAGE if self.direct else count
            if whole == 0:
                raise CheckpointError(f"{what} end early in {self._folder}, at {done} of {len(buffer)} bytes")
            done += whole
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, len(buffer), os.POSIX_FADV_DONTNEED)

    def _unwritable(self, error: OSError) -> RequestError:
        return RequestError(
            f"keys and values beyond the memory budget cannot be written to {self._folder}: {error.strerror or error}; "
            "make room there, or give a larger budget"
        )


def writable_folder(store: Path) -> Path:
    """Return the folder for keys and values: the store's own, whose disk is known, or that for temporary files."""
    return store if os.access(store, os.W_OK) else Path(tempfile.gettempdir())
