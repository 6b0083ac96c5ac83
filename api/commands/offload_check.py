"""`twinfer offload check`: compare a store's bytes with their checksums."""

import argparse
from pathlib import Path

from .console import print_json
from .options import add_json

NAME, HELP = "check", "compare a store's bytes with their checksums"
DESCRIPTION = "Read a whole store and compare each tensor with its checksum."
EPILOG = """\
Exit status 2, and a line that names the record and the tensor, where they differ.

with --json, one object: {"store", "records", "bytes"}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path, help="a folder that twinfer offload build has made")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.offload.shares import is_shares, open_shares
    from twinfer.offload.store import check, open_store

    stores = [*open_shares(args.store).stores.values()] if is_shares(args.store) else [open_store(args.store)]
    for store in stores:
        check(store)
    records, nbytes = sum(len(store.records) for store in stores), sum(store.nbytes for store in stores)
    if args.json:
        print_json({"store": str(args.store), "records": records, "bytes": nbytes})
    else:
        print(f"{args.store}: {records} records, {nbytes:,} bytes, all as they were written")
    return 0
