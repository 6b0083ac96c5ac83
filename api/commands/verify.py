"""`twinfer verify`: is the compiled path right on this machine?"""

import argparse
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..loading import load, open_checkpoint
from .console import print_json, print_table, waiting
from .options import add_compute, add_context, add_device, add_json, add_model, add_storage, positive

if TYPE_CHECKING:
    from twinfer.oracle.verify import VerifyResult

NAME, HELP = "verify", "compare the paths on this machine"
DESCRIPTION = "Hold the compiled path against the reference on this machine: the whole model, then op by op."
EPILOG = """\
Both paths run on the same stored weights. The whole model is taken through drawn schedules (ragged batches, chunked
prompts, growth, sequences given nothing), fed the same tokens on both paths, and judged after each step. A router's
choice of experts is judged too, and both references follow it where rounding explains it. Then every op with a fast
twin is judged by itself on drawn cases. Nothing but rounding may differ, and by no more than a bound that comes from
float64 truth. `twinfer ops --help` explains the guarantees.

exit status: 0 if everything holds, 1 if not

with --json, one object: {"model", "storage", "compute", "device", "holds",
  "paths": {"schedules", "rows", "decisions", "largest_ratio", "ties", "choices", "route_ties", "left_out", "failures",
    "holds"},
  "greedy": {"reference", "compiled", "equal_for", "tie", "holds"},
  "ops": [{"op", "path", "function", "guarantee", "cases", "rejected", "largest_ratio", "complaint", "holds"}]}
  largest_ratio  largest error / bound; above 1 fails
  rows           positions judged; decisions: greedy choices compared, one a row of logits
  ties           greedy choices that differ, within what rounding allows: {"step", "sequence", "position", "chosen",
                 "best", "gap", "allowed"}, the gap being between the logits of both tokens
  choices        choices of experts compared, one a token and layer with experts, of a path that reports them, as the
                 compiled path does here; a path that does not leaves it at 0
  route_ties     choices of experts that differ, or might, within what rounding allows: as ties, and "layer"; chosen
                 and best are lists of experts, and chosen is null of a path that does not report its choices
  left_out       rows not judged: they stand behind a near-tie of a router, of a path that does not report its choices
  Of an encoder, texts are encoded together instead; "schedules" are they, and "greedy" is null.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_context(parser)
    add_storage(parser)
    add_compute(parser)
    add_device(parser)
    parser.add_argument(
        "--schedules", type=positive, default=4, metavar="N", help="how many to draw (default %(default)s)"
    )
    parser.add_argument(
        "--cases", type=positive, default=25, metavar="N", help="how many to draw for each op (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.oracle.verify import verify

    with waiting() as report:
        checkpoint = open_checkpoint(args.model, report, context=args.context)
        model = load(checkpoint, "compiled", args.storage, args.compute, args.device, report=report, routes=True)
        result = verify(
            checkpoint.source,
            storage=model.storage,
            compute=model.compute.dtype,
            device=model.decoder.device,
            candidate=model.decoder,
            schedules=args.schedules,
            cases=args.cases,
            seed=args.seed,
            report=report,
        )
    if args.json:
        about = {"model": args.model, "storage": model.storage.value, "compute": args.compute, "device": args.device}
        print_json({**about, **report_of(result)})
    else:
        _tell(args.model, result)
    return 0 if result.holds else 1


def report_of(result: "VerifyResult") -> dict[str, Any]:
    """The comparison as plain data; the keys are described in EPILOG."""
    greedy = result.free_run
    return {
        "holds": result.holds,
        "paths": {
            "schedules": [repr(drawn) for drawn in result.drawn],
            **{name: value for name, value in asdict(replace(result.model, leaning=None)).items() if name != "leaning"},
            "holds": result.model.holds,
        },
        "greedy": greedy
        and {
            "reference": list(greedy.truth),
            "compiled": list(greedy.candidate),
            "equal_for": greedy.equal_for,
            "tie": None if greedy.tie is None else str(greedy.tie),
            "holds": greedy.holds,
        },
        "ops": [{**asdict(op), "holds": op.holds} for op in result.ops],
    }


def _tell(model: str, result: "VerifyResult") -> None:
    paths, greedy = result.model, result.free_run
    print(f"{model}, {result.storage} weights: compiled path against reference")
    through = f"{len(result.drawn)} batches of texts" if greedy is None else f"{len(result.drawn)} schedules"
    print(
        f"{_verdict(paths.holds)}  whole model, {through}: {paths.rows} rows, "
        f"largest error / bound {paths.largest_ratio:.2f}; {len(paths.ties)} admissible ties"
    )
    if paths.choices:
        near = f"{sum(tie.chosen is not None for tie in paths.route_ties)} are others than the truth's, within rounding"
        print(f"  {paths.choices} choices of experts were compared, as the path reports them; {near}")
    if paths.left_out:
        print(f"  {paths.left_out} rows stand behind near-ties of a router and were left out")
    for line in [*map(str, paths.ties), *map(str, paths.route_ties), *paths.failures]:
        print(f"  {line}")
    if greedy is not None:
        print(f"{_verdict(greedy.holds)}  greedy text: equal for {greedy.equal_for} of {len(greedy.truth)} tokens")
        if greedy.tie is not None:
            print(f"  parted by an admissible tie: {greedy.tie}")
    table = Table("op", "function", "guarantee", "cases", "error / bound", "")
    for op in result.ops:
        ratio = f"{op.largest_ratio:.2f}" if op.cases else "-"
        table.add_row(op.op, op.function, op.guarantee, str(op.cases), ratio, _verdict(op.holds))
    print_table(table)
    for op in result.ops:
        if op.complaint is not None:
            print(f"{op.op}, {op.function}: {op.complaint}")
    print("everything holds" if result.holds else "NOT everything holds")


def _verdict(holds: bool) -> str:
    return "holds" if holds else "FAILS"
