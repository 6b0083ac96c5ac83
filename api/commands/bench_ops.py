"""`twinfer bench ops`: every op, implementation by implementation."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.naming import dtype_name

if TYPE_CHECKING:
    from twinfer.bench.compare import Comparison
    from twinfer.bench.ops import Run
    from twinfer.bench.rows import Row
    from twinfer.bench.settings import Setting, Shape

    Selection = Sequence[tuple[Setting, Shape, Storage]]

NAME, HELP = "ops", "time every op, implementation by implementation"
DESCRIPTION = """\
Time each op's implementations in turn, on the same stored weights, and judge each on the very inputs it is timed on."""
EPILOG = """\
implementations, each a column:
  eager            the reference as it stands; speed-ups are over it
  torch.compile    the reference under torch.compile
  max-autotune     and under its modes of that name
  reduce-overhead  (on a CPU there are no CUDA graphs, and this is not timed)
  compiled         what the compiled path's own graphs call, compiled as they are
  MODULE:FUNCTION  yours, from --impl; called like the reference, by keyword (`twinfer ops` lists the arguments), the
                   weights as float32 tensors of the stored values
The letters of --shape are those of `twinfer ops`; B is 1 unless it is given. Weights and caches are copied until they
outgrow the processor's caches fourfold, and the copies taken in turn; activations stay where they are.

times: medians over the rounds, each of which times every implementation once. Nothing may compile while it is timed:
one that does is an error. Of limit: the least time that reading the bytes, or the operations, would take at the best
rates of the same rounds, in which the machine's fastest reading and multiplying are timed too, over the time taken.

--compare OLD.jsonl measures what OLD.jsonl holds (or what --op and the others choose of it) and compares each row's
speed-up over eager, whose spread over the rounds is its noise; its share of the limit and, on the same machine, its
seconds must agree. What looks slower is measured once more, and the second time counts.

exit status: 0; 1 if an implementation failed to run, recompiled while it was timed, was judged wrong, or became slower
beyond noise than --compare says it was

with --json, one object: {"rows": [...], "geometric_means": {IMPLEMENTATION: MEAN}, "comparison": null or
  {"regressions": [LINE], "faster": [LINE], "not_measured": [ROW], "warnings": [LINE]}}
  rows  as --out writes them, one JSON object a line: times in seconds, null where nothing was measured; "repro" is the
        command that measures the row again
"""
ROUNDS, QUICK_ROUNDS = 15, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], metavar="OP", help="only this op; may be repeated")
    parser.add_argument(
        "--shape", action="append", type=shape, default=[], metavar="T=1,I=576,N=960", help="at this size; repeatable"
    )
    parser.add_argument(
        "--storage",
        action="append",
        type=dtype_name,
        choices=[each.value for each in Storage],
        default=[],
        help="only so; repeatable",
    )
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME", help="only this implementation, and eager; repeatable"
    )
    parser.add_argument(
        "--impl", action="append", default=[], metavar="MODULE:FUNCTION", help="time this function too; repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="one small size of each op, few rounds, for a first look")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"({ROUNDS}; {QUICK_ROUNDS} with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there, one JSON object a line")
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="draw roofline.png and speed-ups.png there")
    parser.add_argument("--compare", type=Path, metavar="OLD.jsonl", help="hold speed-ups against an earlier --out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def shape(text: str) -> dict[str, int]:
    """
    >>> shape("T=1,N=4096")
    {'T': 1, 'N': 4096}
    """
    try:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; write it like T=1,I=576,N=960") from None
    if min(sizes.values()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a size below 1")
    return sizes


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit status."""
    from twinfer.bench import charts, tables
    from twinfer.bench.compare import compare
    from twinfer.bench.rows import Accuracy, Kind, read_rows, write_rows

    old = None if args.compare is None else [row for row in read_rows(args.compare) if row.kind is Kind.OP]
    selection = select(args, old)
    if args.charts is not None:
        charts.check_charts(args.charts)
    if args.out is not None and not args.out.parent.is_dir():
        raise RequestError(f"--out is {args.out}; its folder {args.out.parent} is not there; make it first")
    about = prepare_run(args)
    rows = measure(selection, about, args.out)
    comparison = None
    if old is not None:
        rows = measure_slower_again(old, rows, selection, about)
        comparison = compare(old, rows)
    if args.out is not None:
        write_rows(args.out, rows)
    if args.charts is not None:
        charts.write_charts(rows, args.charts)
    means = tables.geometric_means(rows)
    if args.json:
        print(json.dumps(as_json(rows, means, comparison), allow_nan=False))
    else:
        _console().print(tables.rows_table(rows))
        lines = [*tables.means_lines(means, rows[0].baseline or ""), *tables.remarks(rows)]
        print("\n".join(lines + ([] if comparison is None else tables.comparison_lines(comparison))))
    failed = any(row.error is not None or row.accuracy is Accuracy.FAILED for row in rows)
    return 1 if failed or (comparison is not None and comparison.regressions) else 0


def select(args: argparse.Namespace, old: "Sequence[Row] | None") -> "Selection":
    """What is to be measured. Raises `RequestError` for an op, a shape or a column that there is not."""
    from twinfer.bench.ops import IMPLEMENTATIONS, selected
    from twinfer.bench.settings import SETTINGS

    for name in args.op:
        if name not in SETTINGS:
            raise RequestError(f"--op is {name!r}; the ops that are timed are {', '.join(SETTINGS)}")
    for name in args.column:
        if name not in (*IMPLEMENTATIONS, *args.impl):
            raise RequestError(f"--column is {name!r}; the columns are {', '.join((*IMPLEMENTATIONS, *args.impl))}")
    if args.impl and len(args.op) != 1:
        raise RequestError(f"--impl is a function of one op; --op names {len(args.op)}")
    if args.shape and len(args.op) != 1:
        raise RequestError(f"--shape is of one op; --op names {len(args.op)}")
    if args.rounds is not None and args.rounds < 1:
        raise RequestError(f"--rounds is {args.rounds}; it must be at least 1")
    chosen = [SETTINGS[name] for name in args.op or SETTINGS]
    shapes = [_whole(each, chosen[0]) for each in args.shape]
    storages = [Storage(each) for each in args.storage]
    selection = selected(chosen, shapes, storages, quick=args.quick)
    if old is not None and not args.shape:
        names = {setting.op.name for setting in chosen}
        kept = dict.fromkeys((row.name, tuple(row.shape.items()), row.storage) for row in old if row.name in names)
        selection = [
            (SETTINGS[name], dict(sizes), Storage(storage))
            for name, sizes, storage in kept
            if not storages or storage in storages
        ]
    if not selection:
        raise RequestError("nothing is left to time: no op that was chosen is kept in the storages that were chosen")
    return selection


def _whole(given: "Shape", setting: "Setting") -> dict[str, int]:
    """Every axis of the op, in the record's order."""
    axes = setting.op.axes.split()
    sizes = {"B": 1, **given}
    if set(sizes) != set(axes):
        example = ",".join(f"{axis}={size}" for axis, size in setting.shapes[0].items())
        raise RequestError(
            f"--shape has the axes {' '.join(given)}; {setting.op.name} has {' '.join(axes)}, such as {example}"
        )
    return {axis: sizes[axis] for axis in axes}


def prepare_run(args: argparse.Namespace) -> "Run":
    """What all rows share, this machine's limits among it; the compiler is started."""
    from twinfer.bench.compiling import start_compiler
    from twinfer.bench.limits import find_probes
    from twinfer.bench.machine import this_machine
    from twinfer.bench.ops import Run
    from twinfer.compiled.machine import check_compiler, checked_device
    from twinfer.oracle.check import load_implementation

    device = checked_device(args.device)
    check_compiler(device)
    functions = {name: load_implementation(name) for name in args.impl}
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    _say("starting the compiler, measuring this machine's limits")
    start_compiler(device)
    return Run(
        probes=find_probes(device, rounds=min(rounds, 7), compiled=not args.quick),
        machine=this_machine(device),
        device=device,
        rounds=rounds,
        seed=args.seed,
        columns=frozenset(args.column) or None,
        functions=functions,
    )


def measure(selection: "Selection", about: "Run", out: Path | None = None) -> "list[Row]":
    """The rows of everything selected; `out`, if any, holds after each op all rows so far."""
    from twinfer.bench.ops import measure_op
    from twinfer.bench.rows import write_rows

    rows: list[Row] = []
    for index, (setting, sizes, storage) in enumerate(selection, 1):
        at = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        _say(f"{index} of {len(selection)}: {setting.op.name} {at} {storage}")
        rows += measure_op(setting, sizes, storage, about)
        if out is not None:
            write_rows(out, rows)
    return rows


def measure_slower_again(old: "Sequence[Row]", rows: "list[Row]", selection: "Selection", about: "Run") -> "list[Row]":
    """The rows, those that look slower than the old ones replaced by a second measurement."""
    from twinfer.bench.compare import Verdict, compare

    slower = [change.new for change in compare(old, rows).changes if change.verdict is Verdict.SLOWER]
    places = {(row.name, tuple(row.shape.items()), row.storage) for row in slower}
    again = [each for each in selection if (each[0].op.name, tuple(each[1].items()), each[2]) in places]
    if not again:
        return rows
    _say(f"{len(slower)} rows look slower and are measured once more")
    columns = frozenset(row.implementation for row in slower)
    second = {row.identity: row for row in measure(again, replace(about, columns=columns))}
    return [second[row.identity] if row in slower else row for row in rows]


def _say(message: str) -> None:
    Console(stderr=True).print(message, highlight=False, markup=False)


def as_json(rows: "Sequence[Row]", means: dict[str, float], comparison: "Comparison | None") -> dict[str, Any]:
    """What --json prints."""
    told = comparison and {
        "regressions": [change.text for change in comparison.regressions],
        "faster": [change.text for change in comparison.changes if change.verdict == "faster"],
        "not_measured": list(comparison.only_old),
        "warnings": list(comparison.warnings),
    }
    return {"rows": [asdict(row) for row in rows], "geometric_means": means, "comparison": told}


def _console() -> Console:
    """At full width where standard output is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=200)
