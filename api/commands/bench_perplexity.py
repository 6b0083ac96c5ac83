"""`twinfer bench perplexity`: does the compiled path read a paragraph as the reference does?"""

import argparse

from twinfer.spec.config import Storage

from .console import print_json, waiting
from .options import add_json

NAME, HELP = "perplexity", "compare what both paths make of a paragraph, in each storage"
DESCRIPTION = """\
Compare the mean log-likelihood of a fixed English paragraph on the reference (float64: the truth; float32) and on the
compiled path, on the same stored weights, in each storage."""
EPILOG = """\
The difference between compiled and truth is held against the budget of a mean logit: twice the mean error of the eager
float32 reference plus two roundings at the logits' scale, averaged over the positions.

exit status: 0; 1 if a difference is larger than its bound

with --json, one object: {"rows": [{"storage", "perplexity_reference_float64", "perplexity_reference_float32",
  "perplexity_compiled", "mean_log_likelihood_difference", "mean_logit_bound", "holds"}]}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", default="smollm2", metavar="MODEL", help="a folder, a .gguf file, or a built-in name"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.bench.perplexity import compare, show
    from twinfer.checkpoint import open_model

    with waiting() as report:
        checkpoint = open_model(args.model, report=report)
        rows = [compare(checkpoint, storage) for storage in Storage]
    if args.json:
        print_json({"rows": rows})
    else:
        show(rows)
    return 0 if all(row["holds"] for row in rows) else 1
