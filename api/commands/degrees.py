"""Options that divide a model among ranks, and how a command starts them or becomes one of them."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from twinfer.spec.config import Storage
from twinfer.spec.decoder import Decoder, Path
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import Exchange, ParallelConfig, check_parallel

from ..loading import find_device
from ..ranks import digest
from ..store_source import StoreSource
from .options import positive

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint
    from twinfer.offload.rank_path import StreamedRankPath
    from twinfer.parallel.leading import Leader
    from twinfer.parallel.member import Member

FAST = Path.COMPILED

MOST_RANKS = 256
"""Processes that are started on one machine at most; who asks for more has mistyped."""


def add_degrees(parser: argparse.ArgumentParser) -> None:
    """--tensor, --pipeline, --data, --expert and --expert-slices, with the meaning that `ParallelConfig` gives them."""
    group = parser.add_argument_group(
        "many ranks", "processes that share the model; they are started here, unless torchrun has started them"
    )
    for name, text in (
        ("tensor", "ranks that share each layer"),
        ("pipeline", "stages that hold different layers"),
        ("data", "groups of ranks that serve different prompts"),
        ("expert", "ranks that hold different experts"),
        ("expert-slices", "ranks that hold different slices of the same experts"),
    ):
        group.add_argument(f"--{name}", type=positive, metavar="N", default=1, help=f"{text} (default %(default)s)")
    group.add_argument(
        "--exchange",
        choices=[each.value for each in Exchange],
        default=Exchange.DIRECT.value,
        help="how tokens reach the ranks of their experts (default %(default)s)",
    )


def degrees_of(args: argparse.Namespace) -> ParallelConfig:
    """Return what the options say; raises `RequestError` for degrees that fit no job."""
    return ParallelConfig(
        data=args.data,
        pipeline=args.pipeline,
        tensor=args.tensor,
        expert=args.expert,
        expert_slices=args.expert_slices,
        exchange=Exchange(args.exchange),
    )


def check_request(checkpoint: "Checkpoint", parallel: ParallelConfig, args: argparse.Namespace) -> None:
    """Raise `RequestError`, before any process is started, for what cannot be done by that many ranks."""
    if args.path != FAST.value:
        raise RequestError(f"--path is {args.path}; many ranks run the path {FAST}")
    if args.prompts_file == "-":
        raise RequestError("--prompts-file is -, but standard input is no rank's; give a file")
    if parallel.ranks > MOST_RANKS and not in_job():
        raise RequestError(
            f"data * pipeline * tensor is {parallel.ranks}; at most {MOST_RANKS} ranks are started on one machine, so "
            "start them with torchrun on several"
        )
    streamed = isinstance(checkpoint.source, StoreSource)
    if args.memory_budget is not None and not streamed:
        raise RequestError(
            "--memory-budget bounds a store, which this model is not; make one of it, for as many ranks: "
            "twinfer offload build"
        )
    if args.memory_budget is None and streamed:
        raise RequestError("a store runs within a memory budget, which is not given; give each rank one, such as 512MB")
    _check_device(args.device, parallel)
    storage = args.storage or checkpoint.storage or Storage.FLOAT32
    check_parallel(checkpoint.config, parallel, Storage(storage))
    if isinstance(checkpoint.source, StoreSource):
        from ..stores import check_ranks_of_store

        check_ranks_of_store(checkpoint.source, parallel)


def _check_device(name: str, parallel: ParallelConfig) -> None:
    if find_device(name).index is not None:
        raise RequestError(f"--device is {name}; of many ranks each takes a GPU of its own: give cuda")
    if name == "cuda" and not in_job() and parallel.ranks > torch.cuda.device_count():
        raise RequestError(
            f"data * pipeline * tensor is {parallel.ranks}, but this machine has {torch.cuda.device_count()} GPUs, of "
            "which each rank takes one"
        )


def start_ranks(words: list[str], parallel: ParallelConfig) -> int:
    """Run the command on ranks of this machine; returns the exit status."""
    from twinfer.parallel.launch import launch

    ended = launch(words, parallel.ranks)
    if ended is None:
        return 0
    print(f"twinfer: error: {ended.message}", file=sys.stderr, flush=True)
    return ended.status


def in_job() -> bool:
    """Return whether this process was started as a rank, here or by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def as_member(checkpoint: "Checkpoint", parallel: ParallelConfig, args: argparse.Namespace) -> Iterator["Member"]:
    """Join the job that this process was started for; raises `RequestError` where its ranks are not about the same."""
    from twinfer.parallel.member import joined

    facts = {
        "twinfer": version("twinfer"),
        "the degrees": str(parallel),
        "storage": str(args.storage),
        "compute": args.compute,
        "device": args.device,
        "a model with the digest": digest(checkpoint),
    }
    with joined(parallel, facts, args.device) as member:
        yield member


def device_of(args: argparse.Namespace, member: "Member | None") -> str:
    """Return the device of this process: of several GPUs on a host, each rank has its own."""
    device: str = args.device
    return device if member is None or device != "cuda" else f"cuda:{member.local_rank}"


def follow_leader(decoder: Decoder, member: "Member") -> None:
    """Make the calls of rank 0 on this rank, until it ends."""
    from twinfer.parallel.leading import follow
    from twinfer.parallel.path import RankPath

    assert isinstance(decoder, RankPath)
    follow(decoder, member)


def streaming_leader(decoder: Decoder) -> "tuple[Leader, StreamedRankPath]":
    """Return what leads a job whose ranks stream a store, and this rank's path."""
    from twinfer.offload.rank_path import StreamedRankPath
    from twinfer.parallel.leading import Leader

    assert isinstance(decoder, Leader)
    assert isinstance(decoder.path, StreamedRankPath)
    return decoder, decoder.path


@contextmanager
def leading(decoder: Decoder) -> Iterator[None]:
    """Let the other ranks go at the end, if there are any."""
    yield
    if isinstance(decoder, Leads):
        decoder.end()


@runtime_checkable
class Leads(Protocol):
    """A decoder that other ranks follow."""

    def end(self) -> None: ...
