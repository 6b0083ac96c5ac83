"""`twinfer convert`: write a model in the twinfer form."""

import argparse
from dataclasses import replace
from pathlib import Path

from twinfer.checkpoint.upcycle import Upcycled
from twinfer.spec.config import Storage
from twinfer.spec.errors import one_line
from twinfer.spec.moe import router

from ..loading import open_checkpoint
from .console import print_json, waiting
from .options import add_context, add_json, add_model, add_storage, positive

NAME, HELP = "convert", "write a model in the twinfer form, smaller and quicker to open"
DESCRIPTION = "Write a model as a folder that holds all there is to know of it, its weights in a chosen storage."
EPILOG = """\
examples:
  twinfer convert smollm2 smollm2-int8 --storage int8
  twinfer convert smollm2 smollm2-8x --upcycle 8
  twinfer generate ./smollm2-int8 --prompt "Once upon a time"

The folder holds the config as JSON, each part's weights as safetensors, and the tokenizer: it needs nothing else,
also not the original. One layer is in memory at a time. Used with the storage that it was converted to, which is the
default, the model is the same as the original in that storage, bit by bit. It appears whole or not at all; only a
run that was killed leaves a hidden folder beside it, .OUT.partial-..., which the next one that makes OUT removes.

An upcycled model computes what the dense one does, for equal experts whose weights sum to 1 are one expert.

with --json, one object: {"model", "folder", "storage", "bytes"}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make; it must not exist yet")
    add_storage(parser)
    parser.add_argument(
        "--upcycle",
        type=positive,
        metavar="E",
        help="copy each MLP of a dense model into E experts, 2 of them for each token, behind a seeded random router",
    )
    add_context(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.converting import convert

    with waiting() as report:
        checkpoint = open_checkpoint(args.model, report, context=args.context)
        if args.upcycle is not None:
            chosen_by = router("mixtral", experts=args.upcycle, top_k=min(2, args.upcycle))
            upcycled = Upcycled(checkpoint.source, chosen_by)
            checkpoint = replace(checkpoint, source=upcycled, config=upcycled.config)
        storage = Storage(args.storage) if args.storage else checkpoint.storage or Storage.FLOAT32
        size = convert(checkpoint, args.out, storage, report)
    if args.json:
        print_json({"model": args.model, "folder": str(args.out), "storage": storage.value, "bytes": size})
    else:
        print(f"{args.out}: {one_line(checkpoint.name)} in {storage}, {size:,} bytes")
    return 0
