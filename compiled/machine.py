"""What this machine must have before anything is compiled, found out early and said plainly."""

import contextlib
import ctypes
import os
import shlex
import shutil
import sys

import torch

from ..spec.errors import MachineError, RequestError


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
    """Raise `MachineError` unless torch.compile will find the C++ compiler it needs for a CPU."""
    if device.type != "cpu":
        return
    command = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise MachineError(
            f"the compiled path needs a C++ compiler on a CPU and {program} is not there; "
            "install one (on Debian or Ubuntu: apt install g++), name yours in the variable CXX, or use path=reference"
        )


def return_freed_memory() -> None:
    """Have the C library give freed memory back to the system, where it can.

    Loading makes and frees float32 pieces between the packed ones, and glibc keeps what it freed: tens of MiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
