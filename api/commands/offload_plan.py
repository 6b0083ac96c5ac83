"""`twinfer offload plan`: how a memory budget would be spent, and what a token would take."""

import argparse
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from twinfer.spec.errors import RequestError
from twinfer.spec.naming import dtype_name
from twinfer.spec.parallel import ParallelConfig, check_parallel

from ..loading import find_device, load
from ..memory import peak_memory_bytes
from ..paths import Compute
from ..store_source import StoreSource
from .console import print_json, waiting
from .degrees import (
    add_degrees,
    as_member,
    degrees_of,
    follow_leader,
    in_job,
    leading,
    start_ranks,
    streaming_leader,
)
from .options import add_compute, add_device, add_dram_budget, add_json, batch_size, byte_count, positive

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint

NAME, HELP = "plan", "say how a memory budget would be spent, and what a token would take"
DESCRIPTION = "Plan a run within a memory budget before anything is allocated, by speeds measured now."
EPILOG = """\
example:
  twinfer offload plan smollm2-store --memory-budget 512MB --batch 8

The budget is for what a run takes besides the interpreter with torch. The smallest one that works is named where the
given one does not. Programs are compiled if they are not kept from an earlier run, since computing is measured too.

With --tensor and the other degrees, the plan of each rank, of which each has that budget for itself. The ranks are
started then, to measure computing; all are taken to read from one disk.

with --json, one object: {"plan": bytes for each purpose, "speeds", "step" and "prompts": seconds of computing,
  "prediction", "interpreter_bytes", "processor"}, and of several ranks {"plans": one for each rank, "speeds",
  "read_s", "step" and "prompt": seconds of computing on each rank, "prediction"}
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
    parser.set_defaults(device="cpu", storage=None)
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
            return _of_ranks(args, checkpoint, parallel, reserve)
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


def _of_ranks(args: argparse.Namespace, checkpoint: "Checkpoint", parallel: ParallelConfig, reserve: int) -> int:
    """Print what each rank of a job would take and read, and what all of them measure together."""
    from twinfer.offload.plan import PREFILL_TOKENS
    from twinfer.offload.rank_measuring import steps_of

    from ..stores import check_budget_of_ranks

    if args.device != "cpu":
        raise RequestError(f"--device is {args.device}; ranks run a store on cpu only")
    source, compute = checkpoint.source, Compute(dtype_name(args.compute))
    assert isinstance(source, StoreSource)
    check_parallel(source.config, parallel, source.store.storage)
    if not in_job():  # refused here, where it is too small, before ranks are started
        budgets, least = (args.memory_budget, args.dram_budget), 1 if args.batch == "auto" else args.batch
        check_budget_of_ranks(source, parallel, budgets, least, reserve, compute)
        return start_ranks(args.words, parallel)
    with as_member(checkpoint, parallel, args) as member, waiting() as report:
        given = {"memory_budget": args.memory_budget, "dram_budget": args.dram_budget, "batches": args.batch != 1}
        model = load(checkpoint, compute=compute.value, **given, report=report, member=member)
        if not member.leads:
            follow_leader(model.decoder, member)
            return 0
        leader, path = streaming_leader(model.decoder)
        with leading(leader):
            job, measured = path.job, partial(leader.everywhere, "measure")
            batch = job.best_batch(measured, reserve, _ANY) if args.batch == "auto" else args.batch
            plans, tokens = job.plans(batch, reserve), min(reserve, PREFILL_TOKENS)
            step = steps_of(measured(batch, reserve, 1))
            prompt = tokens, steps_of(measured(batch, reserve, tokens))
            speeds = job.speeds(plans[0])
            predicted, read_s = job.predict(batch, reserve, speeds, step, prompt), job.read_s(plans, speeds)
    if args.json:
        measured_steps = {"step": list(map(asdict, step)), "prompt": list(map(asdict, prompt[1]))}
        shown = {"plans": [each.as_json() for each in plans], "speeds": asdict(speeds), "read_s": read_s}
        print_json({**shown, **measured_steps, "prediction": asdict(predicted)})
        return 0
    print(" ".join([f"{'':>16}", *(f"{f'rank {rank}':>16}" for rank in range(parallel.ranks))]))
    for name in plans[0].as_json():
        print(" ".join([f"{name:>16}", *(f"{each.as_json()[name]:>16,}" for each in plans)]))
    print(f"disk {speeds.disk / 1e9:.2f} GB/s: all ranks together read for {read_s:.3f} s a step")
    print(f"computing a decode step of {batch} takes {job.computed_s(step):.3f} s")
    print(f"a decode step of {batch}: {predicted.step_s:.3f} s, {predicted.token_s:.4f} s a token")
    print(f"a prompt token: {predicted.prompt_token_s:.5f} s")
    print(f"reads are hidden from {predicted.hiding_tokens:.0f} tokens a step on")
    return 0
