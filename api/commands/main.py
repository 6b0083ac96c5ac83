"""The command line: `twinfer COMMAND ...`, one file for each command.

Results go to standard output, everything else to standard error. A request that cannot be met ends with one line
`twinfer: error: ...` on standard error and exit status 2.

Importing torch takes seconds, in which a person may change their mind: until the commands are imported, control-C ends
the process at once. So this module imports nothing but the standard library, nor does the package above it.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

FAILED = 2
"""Exit status of a request that cannot be met, or whose result cannot be written."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status after control-C, as a shell would have it."""
BROKEN_PIPE = 141
"""Exit status when whoever read our output has gone: 128 + SIGPIPE."""
UNWRITABLE = (errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT, errno.EAGAIN, errno.ENXIO, errno.EPERM)
"""Errors of writing to what standard output was redirected to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    _open_standard_streams()
    if sys.stdout is None:
        _complain("standard output is closed; the result has nowhere to go")
        return FAILED
    with suppress(AttributeError):  # what a program has put in its place
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with _signals():
            return _run(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        _drop_output()
        _complain(f"the result cannot be written: {error.strerror}")
        return FAILED
    except SystemExit as left:
        if isinstance(left.__context__, BrokenPipeError):  # so the table's library reports one
            return BROKEN_PIPE
        raise


def _run(argv: Sequence[str] | None) -> int:
    with _ended_at_once():
        from twinfer.spec.errors import TwinferError

        from .parser import parser
    try:
        args = parser().parse_args(argv)
        args.words = list(sys.argv[1:] if argv is None else argv)  # what starts this command again, as a rank of many
        status: int = args.run(args)
        return status
    except TwinferError as error:
        _complain(str(error))
        return FAILED
    finally:
        sys.stdout.flush()  # here its errors can still be told


def _complain(message: str) -> None:
    with suppress(OSError):  # then there is nobody to tell
        print(f"twinfer: error: {message}", file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Send what is still in the buffer nowhere, or the interpreter's last flush complains."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Keep files that are opened later from becoming a standard stream that was closed, and complaints off the output.

    Python has None for a stream that is closed, and prints to standard output what should go to None.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """End the process with status 130 at control-C: a module that is half imported may make something else of it."""
    yield from _handling(signal.SIGINT, signal.default_int_handler, _end_at_once)


@contextmanager
def _signals() -> Iterator[None]:
    """Have a termination request unwind the program, so that what is half done is removed; the status is 143."""
    yield from _handling(signal.SIGTERM, signal.SIG_DFL, _leave)


def _handling(number: int, usual: object, handler: "signal._HANDLER") -> Iterator[None]:
    """Use a handler where the usual one is set and this is the main thread, which alone may set it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(number) is not usual:
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end_at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    os._exit(INTERRUPTED)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
