"""`twinfer routes`: which experts a prompt's tokens choose."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from twinfer.bench.heat_map import check_heat_map, write_heat_map
from twinfer.spec.config import Storage
from twinfer.spec.moe import CapacityConfig

from ..chat import prompt_ids
from ..loading import open_checkpoint
from ..routing import LayerRoutes, routes
from .console import print_json, print_table, waiting
from .options import add_json, add_model, add_storage, token_ids, unicode_text

NAME, HELP = "routes", "show which experts a prompt's tokens choose"
DESCRIPTION = "Show, for each layer with experts, how many of a prompt's tokens choose each of them."
EPILOG = """\
examples:
  twinfer routes ./my-mixtral --prompt "Once upon a time"
  twinfer routes ./my-mixtral --prompt-ids 1,2,3 --capacity-factor 1.25 --png routes.png

Computed on the reference path in float32. The imbalance is the tokens of the expert with the most over the mean; the
closest call is the smallest gap, over all tokens, between the last expert chosen and the best one left, in what the
router compares. A drop rate needs a capacity factor c: an expert then serves c * T * k / E of a prompt's T tokens,
first come, first served.

with --json, one object: {"model", "storage", "tokens", "capacity_factor",
  "layers": [{"layer", "tokens", "imbalance", "dropped", "closest", "closest_token"}]}
  tokens (of a layer)  of each expert; they add up to k for every token
  dropped              part of all choices, null without --capacity-factor
  closest_token        the token's number in all prompts together, from 0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=unicode_text, action="append", metavar="TEXT", help="a prompt; repeatable")
    prompts.add_argument(
        "--prompt-ids", type=token_ids, action="append", metavar="IDS", help="token ids, as 1,2,3; repeatable"
    )
    parser.add_argument("--capacity-factor", type=float, metavar="C", help="count what this capacity would drop")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a heat map of tokens by layer and expert")
    add_storage(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    limit = None if args.capacity_factor is None else CapacityConfig(factor=args.capacity_factor)
    if args.png is not None:
        check_heat_map(args.png)
    with waiting() as report:
        checkpoint = open_checkpoint(args.model, report)
        prompts = prompt_ids(checkpoint, args.prompt or args.prompt_ids)
        storage = Storage(args.storage) if args.storage else checkpoint.storage or Storage.FLOAT32
        layers = routes(checkpoint.source, prompts, limit, storage)
    if args.png is not None:
        write_heat_map([(layer.layer, layer.tokens) for layer in layers], args.png)
    tokens = sum(map(len, prompts))
    if args.json:
        about = {"model": args.model, "storage": storage.value, "tokens": tokens}
        about["capacity_factor"] = args.capacity_factor
        print_json({**about, "layers": [asdict(layer) for layer in layers]})
        return 0
    print(f"{args.model} in {storage}: {tokens} tokens")
    print_table(_table(layers))
    return 0


def _table(layers: list[LayerRoutes]) -> Table:
    table = Table("layer", "tokens of each expert", "max / mean", "dropped", "closest call")
    for layer in layers:
        dropped = "-" if layer.dropped is None else f"{layer.dropped:.1%}"
        closest = "-" if layer.closest is None else f"{layer.closest:.2e} (token {layer.closest_token})"
        table.add_row(str(layer.layer), " ".join(map(str, layer.tokens)), f"{layer.imbalance:.2f}", dropped, closest)
    return table
