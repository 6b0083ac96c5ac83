"""The command line: `twinfer COMMAND ...`, one file for each command.

Results go to standard output, everything else to standard error. A request that cannot be met ends with one line
`twinfer: error: ...` on standard error and exit status 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from twinfer.spec.errors import RequestError, TwinferError

from . import bench, check, convert, demo, embed, generate, inspect, ops, verify
from .command import Command, add_commands

COMMANDS: tuple[Command, ...] = (demo, generate, embed, verify, inspect, convert, check, ops, bench)
INTERRUPTED = 130
"""Exit status after control-C, as a shell would have it: 128 + SIGINT."""
BROKEN_PIPE = 141
"""Exit status when whoever read our output has gone: 128 + SIGPIPE."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are like all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        args = parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except TwinferError as error:
        print(f"twinfer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return BROKEN_PIPE


def parser() -> Parser:
    """The parser of all commands. Each sets `run`, which takes the parsed arguments and returns the exit status."""
    whole = Parser(
        prog="twinfer",
        description="Run large language models twice: on a path to read and on a path to use, proven equal.",
        epilog="Start with: twinfer demo",
    )
    whole.add_argument("--version", action="version", version=f"twinfer {version('twinfer')}")
    add_commands(whole, COMMANDS, metavar="COMMAND", dest="run")
    return whole


if __name__ == "__main__":
    sys.exit(main())
