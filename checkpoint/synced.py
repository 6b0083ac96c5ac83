"""Making what was written last through a failure of power."""

import os
import sys
from pathlib import Path


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk; where folders cannot be opened, it does so."""
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
