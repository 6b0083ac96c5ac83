"""Inductor's cache folder: nobody but this user may have written what is executed from it.

Kernels, wrappers and whole programs are loaded from there as machine code, Python and pickles. By default it lies in
the system's temporary folder under a name that anyone can take first. A folder that others own or may write to, or
that holds anything of that kind, is not used; a private one in the user's home is.
"""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ..spec.errors import MachineError

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_checked: set[str | None] = set()
"""Values of the variable that have been looked at."""


def use_private_cache(report: Callable[[str], None]) -> None:
    """Make Inductor use a folder that only this user can write to; `report` is told if that is not the one named.

    Raises `MachineError` where there is none that can be written. Each folder is looked through once a process.
    """
    if os.environ.get(_VARIABLE) in _checked:
        return
    try:
        named, private = Path(os.environ.get(_VARIABLE) or default_cache_dir()), Path.home() / ".cache/twinfer/inductor"
    except (OSError, RuntimeError) as error:  # no temporary folder, no home
        raise MachineError(
            f"compiled programs have no place ({error}); set {_VARIABLE} to a folder of yours"
        ) from error
    _check_writable(named)
    folder = named.resolve()
    if reason := shared(folder):
        folder = private.resolve()
        _check_writable(folder)
        if again := shared(folder):
            raise MachineError(
                f"compiled programs cannot be kept: {reason}, and {again}; set {_VARIABLE} to a folder of your own"
            )
        report(f"compiled programs are kept in {folder}, for {reason}; {_VARIABLE} can name a folder of your own")
    os.environ[_VARIABLE] = str(folder)
    _checked.add(str(folder))
    triton = os.environ.get("TRITON_CACHE_DIR")
    if triton is not None and (reason := shared(Path(triton).resolve())):
        del os.environ["TRITON_CACHE_DIR"]  # then Triton's files lie in the folder above
        report(f"TRITON_CACHE_DIR is not used, for {reason}")


def shared(folder: Path) -> str | None:
    """Who else may write in the folder, a parent, or anything within, in a few words; None if nobody may."""
    if not hasattr(os, "getuid") or not folder.exists():
        return None
    for parent in (folder, *folder.parents):
        if reason := _another_writes(parent, os.stat(parent), may_be_sticky=parent != folder):
            return reason
    closed = not os.stat(folder).st_mode & 0o077
    for each in _within(folder):
        try:
            found = os.lstat(each)
        except FileNotFoundError:  # another process has finished it meanwhile
            continue
        if stat.S_ISLNK(found.st_mode):
            return f"{each} is a link"
        if reason := _another_writes(each, found, may_be_sticky=False, reachable=not closed):
            return reason
    return None


def _within(folder: Path) -> Iterator[str]:
    for inner, folders, files in os.walk(folder):
        yield from (os.path.join(inner, name) for name in (*folders, *files))


def _another_writes(
    path: Path | str, found: os.stat_result, *, may_be_sticky: bool, reachable: bool = True
) -> str | None:
    """The superuser is trusted, and so is the group that is the user's own, under which many systems create files."""
    if found.st_uid not in (os.getuid(), 0):
        return f"{path} belongs to another user"
    sticky = may_be_sticky and found.st_mode & stat.S_ISVTX
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not _is_own_group(found.st_gid))
    if reachable and others and not sticky:
        return f"other users may write to {path}"
    return None


def _is_own_group(group: int) -> bool:
    """Whether the group bears the user's name and has no other member."""
    import grp
    import pwd

    try:
        name, entry = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


def _check_writable(folder: Path) -> None:
    """Make the folder, for this user only, if it is not there; raise `MachineError` if it cannot be written to."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"compiled programs")
    except OSError as error:
        raise MachineError(
            f"compiled programs cannot be kept in {folder} ({error.strerror or error}); set {_VARIABLE} to a folder "
            "that can be written to, or use path=reference"
        ) from error
