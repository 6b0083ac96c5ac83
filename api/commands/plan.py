"""`twinfer plan`: what each rank of a job would hold, and what the ranks would send each other."""

import argparse
from typing import Any

from rich.table import Table

from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import Exchange, ParallelConfig, check_parallel
from twinfer.spec.plan import Traffic, rank_bytes, traffic, whole_bytes
from twinfer.spec.shard import nearest_divisor

from .console import print_json, print_table
from .inspect import config_of
from .options import MODEL_HELP, add_json

NAME, HELP = "plan", "bytes and messages of a model on many ranks"
DESCRIPTION = """\
Show what each rank of a job would hold and what the ranks would send each other, from the model's config alone: no
weights are read and no ranks are started."""
EPILOG = """\
example:
  twinfer plan 24b-moe-128 --gpus 256 --tensor 8 --expert 128 --expert-slices 2

One call passes --tokens new tokens of a sequence in each data group; messages and bytes are those of all ranks. Rings
are assumed for all-reduce and all-gather, direct messages for all-to-all, experts as chosen equally often.

with --json, one object: {"model", "degrees", "stages": [{"rank", "bytes"}], "tokens",
  "traffic": [{"step", "collective", "calls", "messages", "bytes"}], "messages_per_token", "bytes_per_token"}
  of each stage, its first rank is listed, which holds most
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help=f"{MODEL_HELP}, or a model of the paper (see twinfer inspect -h)"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks of the whole job (default 1)")
    for name, what in (
        ("pipeline", "stages"),
        ("tensor", "ranks that share each layer"),
        ("expert", "ranks that hold different experts"),
        ("expert-slices", "ranks that hold different slices of the same experts"),
    ):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help=f"{what} (default 1)")
    parser.add_argument(
        "--exchange",
        choices=[each.value for each in Exchange],
        default=Exchange.DIRECT.value,
        help="how tokens reach their experts (default direct; coordinated is the paper's PCC)",
    )
    parser.add_argument("--tokens", type=int, default=1, metavar="N", help="new tokens a data group (default 1)")
    parser.add_argument(
        "--storage",
        choices=[each.value for each in Storage],
        default=Storage.BFLOAT16.value,
        help="how weights are kept (default bfloat16)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    parallel = parallel_of(args)
    config, storage = config_of(args.model), Storage(args.storage)
    check_parallel(config, parallel, storage)
    firsts = [stage * parallel.stage_ranks for stage in range(parallel.pipeline)]
    held = {rank: rank_bytes(config, parallel, rank, storage) for rank in firsts}
    sent = traffic(config, parallel, tokens=args.tokens)
    if args.json:
        print_json(_report(args, parallel, held, sent))
        return 0
    print(_headline(args.model, config, parallel))
    for rank, size in held.items():
        print(f"rank {rank} holds {size / 1e9:,.3f} GB of {storage} weights")
    print_table(_table(sent))
    tokens = args.tokens * parallel.data
    print(f"a token: {_messages(sent) / tokens:,.1f} messages and {_bytes(sent) / tokens:,.1f} bytes, over all ranks")
    return 0


def parallel_of(args: argparse.Namespace) -> ParallelConfig:
    """Return the degrees asked for; what tensor and pipeline leave over of the GPUs are data groups."""
    for name in ("gpus", "pipeline", "tensor", "tokens"):
        if getattr(args, name) < 1:
            raise RequestError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    shared = args.pipeline * args.tensor
    if args.gpus % shared:
        nearest = nearest_divisor(args.gpus, args.tensor)
        raise RequestError(
            f"--gpus is {args.gpus}, which does not divide by --pipeline * --tensor = {args.pipeline} * {args.tensor}; "
            f"the nearest --tensor that works with one stage is {nearest}"
        )
    return ParallelConfig(
        data=args.gpus // shared,
        pipeline=args.pipeline,
        tensor=args.tensor,
        expert=args.expert,
        expert_slices=args.expert_slices,
        exchange=Exchange(args.exchange),
    )


def _headline(model: str, config: ModelConfig, parallel: ParallelConfig) -> str:
    return (
        f"{model} on {parallel.ranks} ranks: data {parallel.data}, pipeline {parallel.pipeline}, tensor "
        f"{parallel.tensor}, expert {parallel.expert}, expert slices {parallel.expert_slices}, "
        f"{parallel.exchange} exchange; {len(config.layers)} layers"
    )


def _report(
    args: argparse.Namespace, parallel: ParallelConfig, held: dict[int, int], sent: list[Traffic]
) -> dict[str, Any]:
    tokens = args.tokens * parallel.data
    names = ("data", "pipeline", "tensor", "expert", "expert_slices", "exchange")
    return {
        "model": args.model,
        "degrees": {name: getattr(parallel, name) for name in names},
        "stages": [{"rank": rank, "bytes": size} for rank, size in held.items()],
        "tokens": args.tokens,
        "traffic": [
            {
                "step": each.step,
                "collective": each.collective,
                "calls": each.calls,
                "messages": each.messages,
                "bytes": whole_bytes(each.bytes),
            }
            for each in sent
        ],
        "messages_per_token": _messages(sent) / tokens,
        "bytes_per_token": _bytes(sent) / tokens,
    }


def _table(sent: list[Traffic]) -> Table:
    table = Table("step", "collective", "calls", "messages", "bytes")
    for column in table.columns[2:]:
        column.justify = "right"
    for each in sent:
        numbers = (each.calls, each.messages, whole_bytes(each.bytes))
        table.add_row(each.step, each.collective, *(f"{number:,}" for number in numbers))
    return table


def _messages(sent: list[Traffic]) -> int:
    return sum(each.messages for each in sent)


def _bytes(sent: list[Traffic]) -> float:
    return float(sum(each.bytes for each in sent))
