"""A lock on a folder or file that goes with the process which holds it, however that ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..spec.errors import RequestError


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Hold the lock of a path that is there; raises `RequestError(otherwise)` while another process holds it.

    Windows locks no folders; there nothing is held.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(otherwise) from None
        yield
    finally:
        os.close(descriptor)
