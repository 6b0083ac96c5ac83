"""`twinfer offload plan`: how a memory budget would be spent, and what a token would take."""

import argparse
import platform
from dataclasses import asdict
from pathlib import Path

from twinfer.spec.naming import dtype_name

from ..memory import peak_memory_bytes
from ..paths import Compute
from .console import print_json, waiting
from .options import add_compute, add_dram_budget, add_json, batch_size, byte_count, positive

NAME, HELP = "plan", "say how a memory budget would be spent, and what a token would take"
DESCRIPTION = "Plan a run within a memory budget before anything is allocated, by speeds measured now."
EPILOG = """\
example:
  twinfer offload plan smollm2-store --memory-budget 512MB --batch 8

The budget is for what a run takes besides the interpreter with torch. The smallest one that works is named where the
given one does not. Programs are compiled if they are not kept from an earlier run, since computing is measured too.

with --json, one object: {"plan": bytes for each purpose, "speeds", "computed", "prediction",
  "interpreter_bytes"}
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
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from twinfer.offload.measuring import best_batch, compute, measure, predict
    from twinfer.offload.path import OffloadPath

    from ..stores import open_store_model

    before = peak_memory_bytes()
    with waiting() as report:
        checkpoint = open_store_model(args.store)
        config = checkpoint.config
        arithmetic = Compute(dtype_name(args.compute)).dtype
        reserve = min(args.tokens, config.context)
        store = checkpoint.source.store  # type: ignore[attr-defined]
        budgets = {"budget": args.memory_budget, "dram_budget": args.dram_budget}
        path = OffloadPath(store, config, **budgets, compute=arithmetic, report=report)
        path.open(1 if args.batch == "auto" else args.batch, reserve).close()  # refuses before minutes of compiling
        path.compile()
        batch = best_batch(path, reserve, _ANY) if args.batch == "auto" else args.batch
        speeds, computed = measure(store), compute(path, batch, reserve)
        planned = path.plan
        assert planned is not None
        predicted = predict(planned, speeds, computed)
        path.close()
    if args.json:
        print_json(
            {
                "plan": planned.as_json(),
                "speeds": asdict(speeds),
                "computed": asdict(computed),
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
    print(f"computing a decode step of {planned.batch} takes {computed.step_s:.3f} s, ", end="")
    print(f"a prompt of {computed.prompt_tokens} tokens {computed.prompt_s:.3f} s")
    print(f"a decode step of {planned.batch}: {predicted.step_s:.3f} s, {predicted.token_s:.4f} s a token")
    print(f"a prompt token: {predicted.prompt_token_s:.5f} s")
    print(f"reads are hidden from {predicted.hiding_tokens:.0f} tokens a step on")
    return 0
