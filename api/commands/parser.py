"""The parser of all commands: importing it brings torch, so `main` does so where it is ready for control-C."""

import argparse
import sys
from importlib.metadata import version
from typing import Any, NoReturn

from twinfer.spec.errors import RequestError

from . import bench, check, convert, demo, embed, generate, inspect, offload, ops, plan, verify
from .command import Command, add_commands

COMMANDS: tuple[Command, ...] = (demo, generate, embed, verify, inspect, plan, convert, offload, check, ops, bench)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are like all others: one line."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or the version; the original says nothing where that fails."""
        (sys.stderr if file is None else file).write(message)


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
