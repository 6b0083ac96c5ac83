"""`twinfer offload plan`: how a memory budget would be spent, and what a token would take."""

import argparse
import platform
from dataclasses import asdict
from pathlib import Path

from twinfer.spec.errors import RequestError
from twinfer.spec.naming import dtype_name
from twinfer.spec.parallel import ParallelConfig, check_parallel

from ..loading import find_device
from ..memory import peak_memory_bytes
from ..paths import Compute
from ..store_source import StoreSource
from .console import print_json, waiting
from .degrees import add_degrees, degrees_of
from .options import add_compute, add_device, add_dram_budget, add_json, batch_size, byte_count, positive

NAME, HELP = "plan", "say how a memory budget would be spent, and what a token would take"
DESCRIPTION = "Plan a run within a memory budget before anything is allocated, by speeds measured now."
EPILOG = """\
example:
  twinfer offload plan smollm2-store --memory-budget 512MB --batch 8

The budget is for what a run takes besides the interpreter with torch. The smallest one that works is named where the
given one does not. Programs are compiled if they are not kept from an earlier run, since computing is measured too.

With --tensor and the other degrees, the plan of each rank, of which each has that budget for itself. Computing is not
measured then; the seconds of a step are those of the reads, which all come from one disk.

with --json, one object: {"plan": bytes for each purpose, "speeds", "step" and "prompts": seconds of computing,
  "prediction", "interpreter_bytes", "processor"}, and of several ranks {"plans": one for each rank, "speeds",
  "read_s"}
"""


_ANY = 2**62
"""Prompts that are as many as wanted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", type=Path, help="a folder that twinfer offload build has made")
    parser.add_argument("--memory-budget", type=byte_count, metavar="SIZE", required=True, help="such as 512MB")
    add_dram_budget(parser)
    parser.add_argument(
        "--batch",
        type=batch_size,
        default=1,
        metavar="B",
        help="sequences, or auto, as many as hide the reads (default %(default)s)",
    )
    parser.add_argument(
        "--tokens", type=positive, default=512, metavar="N", help="tokens of each sequence (default %(default)s)"
    )
    add_compute(parser)
    add_device(parser)
    add_degrees(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.offload.measuring import best_batch, compute, measure, predict
    from twinfer.offload.path import OffloadPath

    from ..stores import check_budget, open_store_model, shares_in

    before = peak_memory_bytes()
    with waiting() as report:
        checkpoint = open_store_model(args.store)
        source, config, compute_in = checkpoint.source, checkpoint.config, Compute(dtype_name(args.compute))
        assert isinstance(source, StoreSource)
        parallel, reserve = degrees_of(args), min(args.tokens, config.context)
        if parallel.ranks > 1:
            return _of_ranks(args, source, parallel)
        store = shares_in(source).of_rank(parallel, 0)
        check_budget(source, args.memory_budget, 1 if args.batch == "auto" else args.batch, reserve, compute_in)
        budgets = {"budget": args.memory_budget, "dram_budget": args.dram_budget}
        path = OffloadPath(
            store, config, **budgets, device=find_device(args.device), compute=compute_in.dtype, report=report
        )
        path.compile()
        batch = best_batch(path, reserve, _ANY) if args.batch == "auto" else args.batch
        step, prompts = compute(path, batch, reserve)
        planned = path.plan
        assert planned is not None
        speeds = measure(store, planned.slots, path.device)
        predicted = predict(store, planned, speeds, step, prompts)
        path.close()
    if args.json:
        print_json(
            {
                "plan": planned.as_json(),
                "speeds": asdict(speeds),
                "step": asdict(step),
                "prompts": asdict(prompts),
                "prediction": asdict(predicted),
                "interpreter_bytes": before,
                "processor": platform.processor() or platform.machine(),
            }
        )
        return 0
    for name, value in planned.as_json().items():
        print(f"{name:>16} {value:>16,}")
    how = "directly" if speeds.direct else "through the page cache: this file system knows no direct reads"
    print(f"disk {speeds.disk / 1e9:.2f} GB/s, read {how}; memory {speeds.memory / 1e9:.1f} GB/s, ", end="")
    print(f"copied from {speeds.copies / 1e9:.1f} GB/s; ", end="")
    print(f"products {speeds.gemm / 1e9:.0f} GFLOP/s")
    print(f"computing a decode step of {planned.batch} takes {step.computing.total_s:.3f} s, ", end="")
    print(f"{prompts.count} x {prompts.tokens} tokens of prompts {prompts.computing.total_s:.3f} s")
    print(f"a decode step of {planned.batch}: {predicted.step_s:.3f} s, {predicted.token_s:.4f} s a token")
    print(f"a prompt token: {predicted.prompt_token_s:.5f} s")
    print(f"reads are hidden from {predicted.hiding_tokens:.0f} tokens a step on")
    return 0


def _of_ranks(args: argparse.Namespace, source: StoreSource, parallel: ParallelConfig) -> int:
    """Print what each rank of a job would take and read."""
    from twinfer.offload.measuring import measure
    from twinfer.offload.rank_plan import plan_of_rank
    from twinfer.parallel.weights import local_config

    from ..stores import shares_in

    if args.device != "cpu":
        raise RequestError(f"--device is {args.device}; ranks run a store on cpu only")
    if args.batch == "auto":
        raise RequestError("--batch is auto, which is found for one rank only; give a number")
    check_parallel(source.config, parallel, source.store.storage)
    shares, plans = shares_in(source), []
    for rank in range(parallel.ranks):
        store, config = (
            shares.of_rank(parallel, rank),
            local_config(source.config, parallel, parallel.place(rank).stage),
        )
        given = {"budget": args.memory_budget, "batch": args.batch, "reserve": min(args.tokens, config.context)}
        compute = Compute(dtype_name(args.compute)).dtype
        plans.append(plan_of_rank(store, config, parallel, rank, **given, compute=compute, expands=False))
    speeds = measure(next(iter(shares.stores.values())), plans[0].slots)
    read_s = sum(each.step_bytes for each in plans) / speeds.disk
    if args.json:
        print_json({"plans": [each.as_json() for each in plans], "speeds": asdict(speeds), "read_s": read_s})
        return 0
    print(" ".join([f"{'':>16}", *(f"{f'rank {rank}':>16}" for rank in range(parallel.ranks))]))
    for name in plans[0].as_json():
        print(" ".join([f"{name:>16}", *(f"{each.as_json()[name]:>16,}" for each in plans)]))
    print(f"disk {speeds.disk / 1e9:.2f} GB/s: all ranks together read for {read_s:.3f} s a step")
    return 0
