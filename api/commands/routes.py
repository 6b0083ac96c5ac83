"""`twinfer routes`: which experts a prompt's tokens choose."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from twinfer.spec.config import Storage
from twinfer.spec.errors import MachineError, RequestError
from twinfer.spec.moe import CapacityConfig

from ..chat import prompt_ids
from ..generation import check_prompts
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
        _check_png(args.png)
    with waiting() as report:
        checkpoint = open_checkpoint(args.model, report)
        prompts = prompt_ids(checkpoint, args.prompt or args.prompt_ids)
        check_prompts(checkpoint.config, prompts, max_new_tokens=1)
        storage = Storage(args.storage) if args.storage else checkpoint.storage or Storage.FLOAT32
        layers = routes(checkpoint.source, prompts, limit, storage)
    if args.png is not None:
        _write_png(layers, args.png)
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


def _check_png(file: Path) -> None:
    """Raise, before anything is computed, what would otherwise stop the chart at the end."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MachineError('charts need matplotlib; install it with: pip install "twinfer[bench]"') from None
    if not file.parent.is_dir():
        raise RequestError(f"the folder for {file.name}, {file.parent}, is not there; make it first")


def _write_png(layers: list[LayerRoutes], file: Path) -> None:
    from matplotlib.figure import Figure

    width = max(len(layer.tokens) for layer in layers)
    rows = [[*layer.tokens, *[float("nan")] * (width - len(layer.tokens))] for layer in layers]
    figure = Figure(figsize=(min(16, 3 + width / 4), min(16, 2 + len(layers) / 4)), layout="constrained")
    axes: Any = figure.add_subplot()
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(layers)), [str(layer.layer) for layer in layers])
    figure.colorbar(image, label="tokens")
    figure.savefig(file, format="png")
