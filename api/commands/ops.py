"""`twinfer ops`: what an implementation can be held against."""

import argparse
from dataclasses import asdict

from rich.table import Table

from .console import print_json, print_table
from .options import add_json

NAME, HELP = "ops", "list the ops that implementations can be held against"
DESCRIPTION = "List every op: axes, argument names, guarantee, section of the DeepSpeed Inference paper."
EPILOG = """\
letters of axes: B sequences, T query tokens, S key tokens, H heads, K key/value heads, D head size, M hidden,
  F intermediate, J = rotary size / 2, N outputs and I inputs of a linear, V vocabulary, P positions; of mixtures
  E experts and K choices of a token
guarantees: BITWISE identical bits; BUDGET each row's error within a multiple of the eager reference's own, measured
  against float64; DISCRETE identical decisions but for ties within both budgets; STATISTICAL a tested distribution

with --json, one object: {"ops": [{"name", "axes", "arguments", "outputs", "guarantee", "paper", "fast", "no_fast"}]}
  outputs   the axes of each tensor that an implementation returns
  fast      the paths that have a fast twin of it; no_fast says why there is none
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.oracle.check import ops_table

    rows = ops_table()
    if args.json:
        print_json({"ops": [asdict(row) for row in rows]})
        return 0
    table = Table("op", "axes", "arguments", "guarantee", "paper", "fast twin on", show_lines=True)
    table.columns[0].no_wrap = True
    for row in rows:
        cells = row.name, row.axes, ", ".join(row.arguments), row.guarantee, row.paper, ", ".join(row.fast) or "-"
        table.add_row(*cells)
    print_table(table)
    return 0
