"""`twinfer bench peers`: a model beside other libraries."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinfer.spec.errors import RequestError

from . import bench_options
from .options import positive

if TYPE_CHECKING:
    from twinfer.bench.peers.comparison import Found
    from twinfer.bench.rows import Row
    from twinfer.bench.targets import Ratio
    from twinfer.bench.timing import Timing

NAME, HELP = "peers", "time a model beside transformers, llama.cpp, CTranslate2 and DeepSpeed"
DESCRIPTION = """\
Time the compiled path beside other libraries running the same weights, prompt and precision class, each library in a
subprocess, all in turn round by round; then compare the ratios with this project's targets."""
EPILOG = """\
from a checkout: pip install -e '.[peers]'; an installed wheel does not hold the peers

peers, each used if it is installed:
  transformers eager          float32, default cache and attention
  transformers static cache   float32, the decode step compiled as its documentation does; it is not timed on prompts
  llama.cpp F32 F16 Q8_0 Q4_1 GGUF files made of the same weights by its own quantizer, through llama-cpp-python
  CTranslate2 float32 int8    converted from the same weights
  DeepSpeed init_inference    float32; its kernels are not for CPUs
Models are plain LLaMAs, which all of these know. Every peer has as many threads as torch, reads the same ids, and takes
the likeliest token. Everyone's first 16 tokens are compared with the reference's in float32, once as they follow from
each other and once after the reference's own: whoever computes in float32 should give the same, whoever is quantized
need not, but should pick most of them where it is led.

ratios: of tokens a second, round by round; the value is the median, the spread the 20th and 80th percentile.
  GEMM rates   the weight products of a step one by one, each by the fastest of F.linear, W @ x.t() and oneDNN's
               product, operands in the caches where they fit
  reading      bytes of the stored matrix over the most bytes a second that this run read from memory

exit status: 0, whatever the ratios are; 1 if the compiled path recompiled while it was timed, and with --require if a
ratio is not reached or could not be measured

with --json, one object: {"rows": [...], "targets": [{"name", "value", "p20", "p80", "bound", "at_most", "over",
  "missing", "reached"}], "alone": [{"who", "what", "p20_s", "p50_s", "p80_s"}], "absent": {PEER: REASON},
  "agreements": {NAME: {"alone", "led", "of"}}}
  rows   as `twinfer bench ops --help` describes them
  alone  products outside of any model, which ratios are held against
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_options.add_arguments(parser, steps=24)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME", help="only peers whose name begins so; repeatable"
    )
    parser.add_argument(
        "--square",
        type=positive,
        action="append",
        metavar="N",
        help="size of the square products timed alone (4096 and 8192); repeatable",
    )
    parser.add_argument("--require", action="store_true", help="fail unless every ratio is reached")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit status."""
    if find_spec("twinfer.bench.peers") is None:
        raise RequestError("twinfer bench peers is run from a checkout with the extra peers: pip install -e '.[peers]'")
    from twinfer.bench.model_tables import print_ratios, print_speeds
    from twinfer.bench.peers.comparison import measure
    from twinfer.bench.plan import Plan
    from twinfer.bench.rows import write_rows
    from twinfer.bench.targets import ratio, targets
    from twinfer.checkpoint import open_model

    plan, names = Plan.of(args), chosen(args.peer)
    squares = tuple(dict.fromkeys(args.square or (4096, 8192)))
    bench_options.check_out(args.out)
    checkpoint = open_model(args.model, report=bench_options.say)
    plan.check(checkpoint.config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        found = measure(args.model, checkpoint, plan, names, squares, Path(folder), bench_options.say)
    wanted = targets(plan.storages, plan.prefills, plan.batches, squares)
    ratios = [ratio(each, found.measured, found.absent) for each in wanted]
    rows = found.rows(args.model)
    if args.out is not None:
        write_rows(args.out, rows)
    if args.json:
        print(json.dumps(as_json(rows, ratios, found), allow_nan=False))
    else:
        print_speeds(rows)
        print_ratios(ratios)
        for name, why in found.absent.items():
            print(f"{name}: {why}")
    failed = any(row.error is not None and row.implementation == "compiled" for row in rows)
    return 1 if failed or (args.require and not all(each.reached for each in ratios)) else 0


def chosen(prefixes: Sequence[str]) -> list[str]:
    """Peers whose names begin so; all of them where nothing is asked for. Raises `RequestError` for none."""
    from twinfer.bench.peers.table import PEERS

    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in PEERS):
            raise RequestError(f"--peer is {prefix!r}; the peers are {', '.join(PEERS)}")
    return [name for name in PEERS if not prefixes or name.startswith(tuple(prefixes))]


def as_json(rows: "Sequence[Row]", ratios: "Sequence[Ratio]", found: "Found") -> dict[str, Any]:
    """What --json prints."""
    models = set(found.workloads)
    return {
        "rows": [asdict(row) for row in rows],
        "targets": [{**asdict(each), "reached": each.reached} for each in ratios],
        "alone": [
            {"who": key.who, "what": key.what, **quantiles(each.timing)}
            for key, each in found.measured.items()
            if key.who not in models
        ],
        "absent": dict(found.absent),
        "agreements": {name: asdict(each) for name, each in found.agreements.items()},
    }


def quantiles(timing: "Timing") -> dict[str, float | None]:
    return {f"p{share}_s": timing.quantile(share / 100) for share in (20, 50, 80)}
