"""What this machine must have before anything is compiled, found out early and said plainly."""

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..spec.errors import MachineError, RequestError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""The numbers that glibc's malloc.h gives its limits: what may stay free at the heap's end, and what is mapped."""


def checked_device(device: str | torch.device) -> torch.device:
    """The device, if tensors can be made on it. Raises `RequestError` or `MachineError`, which say why not."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f'device is {device!r}; it must be one that torch knows, such as "cpu" or "cuda"') from error
    if wanted.type == "meta":
        raise RequestError('device is "meta", which holds no values; it must be one such as "cpu" or "cuda"')
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MachineError(f"device {str(device)!r} cannot be used here ({_first_line(error)}); use cpu") from error
    return wanted


def check_compiler(device: torch.device) -> None:
    """Raise `MachineError` unless torch.compile will find a C++ compiler that works, which it needs for a CPU."""
    if device.type != "cpu":
        return
    command = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # one program, as torch has it
    remedy = "install one (on Debian or Ubuntu: apt install g++), name yours in the variable CXX, or use path=reference"
    if shutil.which(command) is None:
        raise MachineError(
            f"the compiled path needs a C++ compiler on a CPU and {command!r} is not there, as one program; {remedy}"
        )
    if fault := _compiler_fault(command, os.environ.get("PATH", "")):
        raise MachineError(f"the C++ compiler {command!r} does not work ({fault}); {remedy}")


@functools.cache
def _compiler_fault(command: str, path: str) -> str | None:
    """Why the compiler makes no library of a line of C++ that can be loaded; None if it does. `path`: found there."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "line.cpp"), Path(folder, "line.so")
        source.write_text('extern "C" int line() { return 1; }\n')
        try:
            ran = subprocess.run(
                [command, "-shared", "-fPIC", str(source), "-o", str(library)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=60,
            )
            if ran.returncode != 0:
                return next(iter(ran.stderr.strip().splitlines()), f"it ends with status {ran.returncode}")
            return None if ctypes.CDLL(str(library)).line() == 1 else "what it makes is wrong"
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            return _first_line(error)


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system, where it can.

    Loading makes and frees float32 pieces between the packed ones, and glibc keeps what it freed: tens of MiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def bound_freed_memory(budget: int) -> None:
    """Have the C library keep little of what is freed from now on, by the bytes that all of it together may take.

    glibc maps large pieces by themselves, which freeing gives back, but raises that limit, up to 32 MiB, to the size of
    what was freed last, and keeps such pieces from then on: gaps between them grow past a memory limit that all pieces
    together are far below. Here the limit is a 128th of the budget, from 1 to 32 MiB: a larger budget has room for
    larger gaps, and mapping takes time. Twice the limit may stay free at the heap's end. Other C libraries are left
    alone.
    """
    if sys.platform != "linux":
        return
    least = min(max(budget // 128, 1 << 20), 32 << 20)
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, least)
        library.mallopt(_M_TRIM_THRESHOLD, 2 * least)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
