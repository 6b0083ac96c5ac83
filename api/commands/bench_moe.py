"""`twinfer bench moe`: mixtures of experts, part by part."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.naming import dtype_name

from . import bench_options
from .options import positive

if TYPE_CHECKING:
    from twinfer.bench.moe import Timed
    from twinfer.bench.ops import Run

NAME, HELP = "moe", "time routing, dispatch and whole mixtures of experts"
DESCRIPTION = """\
Time mixtures of experts part by part, each beside what it is compared with, all of one size in turn; then compare the
ratios with this project's targets."""
EPILOG = """\
parts:
  routing     logits to choices and weights, 128 experts; over the reference as it stands
  dispatch    gating, dispatch and combine, what experts compute left out: 128 experts, hidden 1024, top-1 and top-2,
              capacity tokens * k / 128, and DeepSpeed's least of 4 where that is more; tables over one-hot einsums
  layer       Mixtral-8x7B at a quarter of its width, Qwen3-30B-A3B at half, and 64 experts as DeepSpeed has them; 1 and
              8 tokens are a step of as many sequences, 64 and 512 a prompt. From a checkout with transformers and
              deepspeed installed (pip install -e '.[peers]') beside theirs, in float32
  experts     64 tokens, top-2, of 8 to 256 experts alike
  generation  tokens of one sequence after a prompt of 32, float32; over the reference

of limit: the floor over the time taken; the floor is the larger of reading the router and the chosen experts as stored
at this run's read bandwidth, and the products at its GEMM rate.
ratios: round by round; the value is the median, the spread the 20th and 80th percentile.

exit status: 0, whatever the ratios are; with --require 1 if a ratio is not reached or could not be measured

with --json, one object: {"rows": [...], "targets": [{"name", "value", "p20", "p80", "bound", "at_most", "over",
  "missing", "reached"}], "absent": {PEER: REASON}}
  rows  as `twinfer bench ops --help` describes them
"""
PARTS = ("routing", "dispatch", "layer", "experts", "generation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", action="append", choices=PARTS, default=[], help="only this part; repeatable")
    parser.add_argument(
        "--tokens", action="append", type=positive, default=[], metavar="N", help="only so many; repeatable"
    )
    parser.add_argument(
        "--storage",
        action="append",
        type=dtype_name,
        choices=[each.value for each in Storage],
        default=[],
        help="layers only so (float32 and int8); repeatable",
    )
    parser.add_argument("--mixture", action="append", default=[], metavar="NAME", help="only this layer; repeatable")
    parser.add_argument("--model", default="tiny-moe", help="what generates (default %(default)s)")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="to take medians over (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default %(default)s)")
    parser.add_argument("--require", action="store_true", help="fail unless every ratio is reached")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows, one JSON object a line")
    parser.add_argument("--charts", type=Path, metavar="FOLDER", help="draw moe-experts.png there")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit status."""
    import torch
    from rich.console import Console

    from twinfer.bench import charts, compiling, limits, tables
    from twinfer.bench.machine import this_machine
    from twinfer.bench.model_tables import print_ratios
    from twinfer.bench.moe import Timed
    from twinfer.bench.moe_chart import write_experts_chart
    from twinfer.bench.ops import Run
    from twinfer.bench.rows import write_rows
    from twinfer.bench.targets import ratio
    from twinfer.compiled.machine import check_compiler

    check(args)
    device = torch.device("cpu")
    check_compiler(device)
    bench_options.check_out(args.out)
    if args.charts is not None:
        charts.check_charts(args.charts)
    bench_options.say("starting the compiler, measuring this machine's limits")
    compiling.start_compiler(device)
    about = Run(
        probes=limits.find_probes(device, rounds=min(args.rounds, 7)),
        machine=this_machine(device),
        device=device,
        rounds=args.rounds,
        seed=args.seed,
    )
    found = Timed()
    for timed in measured(args, about):
        found.add(timed)
        if args.out is not None:
            write_rows(args.out, found.rows)
    ratios = [ratio(each, found.measured, found.absent) for each in found.targets]
    if args.charts is not None:
        write_experts_chart([row for row in found.rows if row.name == "over experts"], args.charts)
    if args.json:
        told = {
            "rows": [asdict(row) for row in found.rows],
            "targets": [{**asdict(each), "reached": each.reached} for each in ratios],
            "absent": found.absent,
        }
        print(json.dumps(told, allow_nan=False))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=200)
        console.print(tables.rows_table(found.rows))
        print_ratios(ratios)
        for name, why in found.absent.items():
            print(f"{name}: {why}")
    return 1 if args.require and not all(each.reached for each in ratios) else 0


def check(args: argparse.Namespace) -> None:
    """Raise `RequestError` for a layer that there is not, and for a chart of what is not timed."""
    from twinfer.bench.mixtures import MIXTURES

    for name in args.mixture:
        if name not in MIXTURES:
            raise RequestError(f"--mixture is {name!r}; the layers that are timed are {', '.join(MIXTURES)}")
    if args.charts is not None and args.part and "experts" not in args.part:
        raise RequestError("--charts draws the part experts, which --part leaves out; add --part experts")


def measured(args: argparse.Namespace, about: "Run") -> "Iterator[Timed]":
    """Every part that is wanted, size by size."""
    from twinfer.bench import moe
    from twinfer.bench.mixtures import MIXTURES
    from twinfer.bench.moe_generation import generation
    from twinfer.checkpoint import open_model

    parts, say = args.part or PARTS, bench_options.say
    storages = [Storage(each) for each in args.storage] or [Storage.FLOAT32, Storage.INT8]
    if "routing" in parts:
        for tokens in args.tokens or moe.DISPATCH_TOKENS:
            say(f"routing of {tokens} tokens")
            yield from (moe.routing(tokens, top_k, about) for top_k in (1, 2))
    if "dispatch" in parts:
        for tokens, top_k, least in moe.dispatch_sizes(args.tokens or moe.DISPATCH_TOKENS):
            say(f"dispatch of {tokens} tokens, top-{top_k}, capacity {least} or more")
            yield moe.dispatch(tokens, top_k, least, about)
    if "layer" in parts:
        peers = None
        if find_spec("twinfer.bench.peers") is not None:
            from twinfer.bench.peers.mixtures import peers_of

            peers = peers_of
        for name in args.mixture or MIXTURES:
            say(f"layer {name}")
            yield from moe.layer(MIXTURES[name], args.tokens or moe.TOKENS, storages, about, peers)
    if "experts" in parts:
        say("time over the number of experts")
        yield from moe.over_experts(moe.EXPERTS, storages, about)
    if "generation" in parts:
        checkpoint = open_model(args.model, report=say)
        say(f"generation with {checkpoint.name}")
        yield generation(checkpoint, args.model, about)
