"""`twinfer offload`: stores of layers that are streamed from a disk."""

import argparse

from . import offload_build, offload_check, offload_plan
from .command import Command, add_commands

NAME, HELP = "offload", "run models larger than memory from a store on disk"
DESCRIPTION = "Make, check and plan with stores: a model's layers, prepared and ready to be streamed from a disk."
EPILOG = """A store runs like a model: twinfer generate STORE --memory-budget 256MB --prompt TEXT

Each explains itself, such as twinfer offload plan --help, and what it prints with --json."""
COMMANDS: tuple[Command, ...] = (offload_build, offload_check, offload_plan)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, COMMANDS, metavar="WHAT", dest="offload")


def run(args: argparse.Namespace) -> int:
    status: int = args.offload(args)
    return status
