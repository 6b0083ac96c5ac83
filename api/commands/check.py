"""`twinfer check`: anyone's implementation of an op, held against the reference."""

import argparse
import sys
from contextlib import redirect_stdout
from dataclasses import asdict

from .console import print_json
from .options import add_json

NAME, HELP = "check", "hold your implementation of an op against the reference"
DESCRIPTION = "Try an implementation of an op on drawn cases, and shrink to the smallest one on which it fails."
EPILOG = """\
An implementation is a function that takes the op's arguments by keyword and returns what the reference returns.
`twinfer ops` lists the ops and their arguments. Modules in the current folder are found.

example, my_kernels.py:
  def attention(*, query_BTHD, key_BSKD, value_BSKD, visible_TS, scale): ...
then:
  twinfer check attention --impl my_kernels:attention

exit status: 0 if the guarantee held in every case, 1 if not; then the smallest failing case is shown, with Python that
reproduces it when pasted

with --json, one object: {"op", "implementation", "holds", "cases", "rejected", "largest_ratio", "left_out", "report",
  "smallest", "snippet"}
  cases          drawn and judged; rejected: those on which the reference itself overflows
  largest_ratio  largest error / bound among the cases that passed
  left_out       rows behind a near-tie of a router, which moe does not judge unless the experts are returned too
  report         what is wrong with the smallest failing case; null where all hold, like smallest and snippet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP", help="such as attention; `twinfer ops` lists them")
    parser.add_argument(
        "--impl", required=True, metavar="MODULE:FUNCTION", help="what to check, as package.module:function"
    )
    parser.add_argument(
        "--max-examples", type=int, default=1000, metavar="N", help="how many cases to draw (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default %(default)s)")
    parser.add_argument(
        "--arithmetic",
        choices=("wide", "narrow"),
        default="wide",
        help="narrow: it sums in its 16-bit dtype, and gets a wider bound (default %(default)s: sums are float32)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a convention other than ours: ties=any, angles=float32, unseen=nan, recipe=mixtral, gate_up=interleaved "
        "(may be given more than once; a wrong name lists those of the op)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.oracle.check import check_op, load_implementation
    from twinfer.oracle.table import op_named
    from twinfer.oracle.trial import Arithmetic

    op_named(args.op).under(*args.option)  # before a stranger's module is imported
    with redirect_stdout(sys.stderr):  # whatever that module prints is no result of ours
        implementation = load_implementation(args.impl)
        result = check_op(
            args.op,
            implementation,
            args.max_examples,
            seed=args.seed,
            named=args.impl,
            arithmetic=Arithmetic(args.arithmetic),
            options=args.option,
        )
    if args.json:
        print_json(asdict(result))
    elif result.holds:
        print(
            f"{result.op}: {result.implementation} holds in {result.cases} cases ({result.rejected} rejected: the "
            f"reference overflows); largest error / bound {result.largest_ratio:.2f}"
            + (f"; {result.left_out} rows left out, behind near-ties" if result.left_out else "")
        )
    else:
        print(f"{result.implementation} fails after {result.cases} cases\n{result.report}")
    return 0 if result.holds else 1
