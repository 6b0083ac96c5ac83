"""`twinfer bench`: how fast, side by side, on this machine."""

import argparse

from . import bench_model, bench_moe, bench_ops, bench_peers, bench_perplexity
from .command import Command, add_commands

NAME, HELP = "bench", "measure speeds side by side on this machine"
DESCRIPTION = "Measure speeds side by side on this machine, each held against what the machine can do."
EPILOG = "Each explains itself, such as twinfer bench ops --help, and what it prints with --json."
COMMANDS: tuple[Command, ...] = (bench_ops, bench_model, bench_moe, bench_peers, bench_perplexity)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_commands(parser, COMMANDS, metavar="WHAT", dest="measure")


def run(args: argparse.Namespace) -> int:
    status: int = args.measure(args)
    return status
