"""The shape of a command's file, and a parser's subcommands from a table of them.

What only `run` needs is imported by `run`, so that `--help` and a mistyped option answer at once.
"""

import argparse
from collections.abc import Sequence
from typing import Protocol


class Command(Protocol):
    """A command's file, such as `check`: the module itself is the value."""

    NAME: str
    """The word on the command line."""
    HELP: str
    """Its line in the list of commands."""
    DESCRIPTION: str
    EPILOG: str
    """Examples, exit status, keys of --json; the end of its own --help, as DESCRIPTION is the beginning."""

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None:
        """Give the command's parser its options."""

    def run(self, args: argparse.Namespace, /) -> int:
        """Do it, and return the exit status."""


def add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command], *, metavar: str, dest: str) -> None:
    """Give a parser a subcommand for each file; the parsed arguments hold its `run` under the name `dest`."""
    subparsers = parser.add_subparsers(metavar=metavar, required=True)
    for command in commands:
        added = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(**{dest: command.run})
