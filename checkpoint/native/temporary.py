"""A hidden folder in which another one is made: whole or not at all, and gone however the process that made it ends.

Its maker holds a lock on it, which the system lets go of when the process is killed; so what nobody holds is abandoned,
and whoever next makes a folder of that name removes it. (Windows locks no folders; there it stays.)
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked; at the end it is removed where it has not become the target."""
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.absolute().parent))
    lock = _lock(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(target: Path) -> None:
    """Remove the folders that killed processes began beside the target, for the same target."""
    for entry in list(target.absolute().parent.iterdir()):
        if entry.name.startswith(_prefix(target)) and entry.is_dir() and not entry.is_symlink():
            lock = _lock(entry)
            if lock is not None:
                shutil.rmtree(entry, ignore_errors=True)
                os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}.partial-"


def _lock(folder: Path) -> int | None:
    """Lock a folder; returns the descriptor that holds the lock, or None where another holds it or none can be had."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
