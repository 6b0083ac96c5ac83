"""`twinfer offload build`: write a model as a store."""

import argparse
from pathlib import Path

from twinfer.spec.config import Storage
from twinfer.spec.errors import one_line

from ..loading import open_checkpoint
from .console import print_json, waiting
from .degrees import add_degrees, degrees_of
from .options import add_context, add_json, add_model, add_storage

NAME, HELP = "build", "write a model as a store"
DESCRIPTION = "Write a model's layers, prepared for this processor, as a store."
EPILOG = """\
examples:
  twinfer offload build smollm2 smollm2-store --storage int8
  twinfer generate smollm2-store --memory-budget 256MB --prompt "Once upon a time"
  twinfer offload build smollm2 smollm2-cuda --storage bfloat16 --device cuda
  twinfer offload build smollm2 smollm2-ranks --tensor 3
  twinfer generate smollm2-ranks --tensor 3 --memory-budget 128MB --prompt "Once upon a time"

With degrees the store is one for many ranks: a share for each place of --tensor, --expert and --expert-slices, which it
serves only; any number of stages (--pipeline) reads it, and of data groups that share no experts.

One layer is in memory at a time. The store appears whole or not at all; a run that was killed leaves a hidden folder
beside it, .STORE.partial, and the same command goes on from there.

with --json, one object: {"model", "store", "storage", "bytes"}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("store", metavar="STORE", type=Path, help="the folder to make; it must not exist yet")
    add_storage(parser)
    parser.add_argument("--device", default="cpu", help="what it is to run on, cpu or cuda (default %(default)s)")
    add_context(parser)
    add_degrees(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..stores import build_store

    parallel = degrees_of(args)
    with waiting() as report:
        checkpoint = open_checkpoint(args.model, report, context=args.context)
        storage = Storage(args.storage) if args.storage else checkpoint.storage or Storage.FLOAT32
        size = build_store(checkpoint, args.store, storage, report, parallel, args.device)
    if args.json:
        print_json({"model": args.model, "store": str(args.store), "storage": storage.value, "bytes": size})
    else:
        print(f"{args.store}: {one_line(checkpoint.name)} in {storage}, {size:,} bytes")
    return 0
