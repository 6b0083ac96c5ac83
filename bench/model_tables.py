"""Speeds of whole models, and the targets, for the terminal."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from .footprint import Footprint
from .rows import Row
from .targets import Ratio

_MIB = 2**20


def print_speeds(rows: Sequence[Row]) -> None:
    """Tokens a second, one line for each implementation and storage, one column for each thing that was run."""
    workloads = list(dict.fromkeys(tuple(row.shape.items()) for row in rows))
    machine = rows[0].machine
    table = Table(
        title=f"{rows[0].name}: tokens/s, medians (20 .. 80 %), {machine.processor}, {machine.threads} threads"
    )
    table.add_column("implementation")
    table.add_column("storage")
    for workload in workloads:
        table.add_column(_heading(dict(workload)), justify="right")
    for who in dict.fromkeys((row.implementation, row.storage) for row in rows):
        own = {tuple(row.shape.items()): row for row in rows if (row.implementation, row.storage) == who}
        table.add_row(*who, *(_speed(own.get(workload)) for workload in workloads))
    _print(table)
    for line in dict.fromkeys(f"{row.implementation} {row.storage}: {row.note}" for row in rows if row.note):
        print(line)
    for row in rows:
        if row.error is not None:
            print(f"{row.title}: ERROR: {row.error}")


def _heading(shape: dict[str, int]) -> str:
    return f"decode\nbatch {shape['batch']}" if shape["steps"] else f"prefill\n{shape['prompt']}"


def _speed(row: Row | None) -> str:
    if row is None or row.tokens_per_s is None or row.p20_s is None or row.p80_s is None or row.p50_s is None:
        return "-" if row is None else "failed"
    slow, fast = (row.tokens_per_s * row.p50_s / seconds for seconds in (row.p80_s, row.p20_s))
    return f"{row.tokens_per_s:.4g} ({slow:.4g} .. {fast:.4g})"


def print_ratios(ratios: Sequence[Ratio]) -> None:
    """Print each target, and the ratio that was measured."""
    table = Table(title="targets")
    for title in ("ratio", "value", "20 .. 80 %", "wanted", "reached"):
        table.add_column(title, justify="left" if title == "ratio" else "right")
    for each in ratios:
        wanted = f"{'<=' if each.at_most else '>='} {each.bound:g}"
        if each.value is None:
            table.add_row(f"{each.name}\n  {each.missing}", "-", "-", wanted, "-")
        else:
            verdict = "yes" if each.reached else "NO"
            table.add_row(each.name, f"{each.value:.2f}", f"{each.p20:.2f} .. {each.p80:.2f}", wanted, verdict)
    _print(table)


def print_footprints(footprints: Sequence[Footprint]) -> None:
    """Print what subprocesses measured of each storage."""
    table = Table(title="each storage in subprocesses; memory in MiB beyond an interpreter with torch")
    for title in ("storage", "compile s", "again", "weights", "peak", "allowed", "outside kernels", "loops a layer"):
        table.add_column(title, justify="left" if title == "storage" else "right")
    for each in footprints:
        sizes = (each.weight_bytes, each.beyond_torch_bytes, each.allowed_bytes)
        table.add_row(
            each.storage,
            f"{each.compile_cold_s:.1f}",
            f"{each.compile_warm_s:.1f}",
            *("-" if size is None else f"{size / _MIB:.0f}" for size in sizes),
            f"{100 * each.outside_kernels:.1f} %",
            "-" if each.loops_a_layer is None else f"{each.loops_a_layer:.3g}",
        )
    _print(table)


def _print(table: Table) -> None:
    """At full width where standard output is not a terminal."""
    (Console() if sys.stdout.isatty() else Console(width=200)).print(table)
