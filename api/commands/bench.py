"""`twinfer bench`: how fast, side by side, on this machine."""

import argparse
from typing import Any

from twinfer.bench import model_command, ops_command, peers_command

SUBCOMMANDS = {"ops": ops_command, "model": model_command, "peers": peers_command}
"""Each has HELP, `add_arguments(parser)` and `run(args)`, and imports nothing slow before it runs."""


def add_to(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "bench",
        help="measure speeds side by side on this machine",
        description="Measure speeds side by side on this machine, each held against what the machine can do.",
        epilog="Each explains itself, such as twinfer bench ops --help, and what it prints with --json.",
    )
    subcommands = parser.add_subparsers(metavar="WHAT", required=True)
    for name, subcommand in SUBCOMMANDS.items():
        measured = subcommands.add_parser(name, help=subcommand.HELP)
        subcommand.add_arguments(measured)
        measured.set_defaults(run=subcommand.run)
