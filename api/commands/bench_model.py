"""`twinfer bench model`: a model on the compiled path."""

import argparse
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from . import bench_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from twinfer.bench.footprint import Footprint
    from twinfer.bench.plan import Plan
    from twinfer.bench.rows import Row
    from twinfer.checkpoint import Checkpoint
    from twinfer.spec.config import Storage

NAME, HELP = "model", "time a model on the compiled path: batches, prompts, compiling, memory"
DESCRIPTION = """\
Time the compiled path in each storage, alone: decode steps of one sequence and of several, and prompts; then compile
time, peak memory and what a step spends outside of kernels, in subprocesses."""
EPILOG = """\
speeds: medians over the rounds, each of which runs every storage once. Nothing may compile while it is timed.

in subprocesses, one with an empty cache folder and one that finds what the first has left there:
  compile s, again  seconds until all three or four graphs are ready: a prompt, one sequence, several
  peak              most memory that was resident; allowed is 1.5 times the prepared weights and 150 MiB
  outside kernels   share of a token's time, of one sequence, that the path spends outside of the kernels that Inductor
                    made: both are timed in the same steps, the kernels where the generated code calls them; a step
                    that records a CPU graph or rebinds one counts with the others
  loops a layer     parallel loops of that step's kernels, `#pragma omp for` in the generated C++

with --switches the path is also compiled, and timed beside itself, without each of its optimizations in turn, which
takes a quarter of an hour a storage; nothing is measured in subprocesses. Speed-ups of these rows are over
the path as it is.

exit status: 0; 1 if the compiled path recompiled while it was timed

with --json, one object: {"rows": [...], "subprocess": [{"storage", "compile_cold_s", "compile_warm_s", "weight_bytes",
  "step_s", "outside_kernels", "loops_a_layer", "peak_bytes", "beyond_torch_bytes", "allowed_bytes"}]}
  rows  as `twinfer bench ops --help` describes them; speed-ups are over the first storage
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bench_options.add_arguments(parser, steps=64)
    parser.add_argument(
        "--switches", action="store_true", help="beside the path as it is, with one optimization off at a time"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; the exit status."""
    from twinfer.bench.footprint import measure_footprint
    from twinfer.bench.model_tables import print_footprints, print_speeds
    from twinfer.bench.plan import Plan
    from twinfer.bench.rows import write_rows
    from twinfer.checkpoint import open_model

    plan = Plan.of(args)
    bench_options.check_out(args.out)
    checkpoint = open_model(args.model, report=bench_options.say)
    plan.check(checkpoint.config)
    rows = measure(checkpoint, args.model, plan, switches=args.switches)
    footprints = {}
    for storage in () if args.switches else plan.storages:
        bench_options.say(f"{storage}, in subprocesses")
        footprints[storage.value] = measure_footprint(args.model, storage.value, plan.prompt, plan.steps)
    rows = [with_footprint(row, footprints) for row in rows]
    if args.out is not None:
        write_rows(args.out, rows)
    if args.json:
        print(json.dumps(as_json(rows, list(footprints.values())), allow_nan=False))
    else:
        print_speeds(rows)
        if footprints:
            print_footprints(list(footprints.values()))
    return 1 if any(row.error is not None for row in rows) else 0


def measure(checkpoint: "Checkpoint", model: str, plan: "Plan", *, switches: bool = False) -> "list[Row]":
    """Speeds of all storages in turn; `model` is what the command line named."""
    from twinfer.bench.limits import measure_limits
    from twinfer.bench.machine import this_machine
    from twinfer.bench.plan import About, own_candidates, row, samples_of
    from twinfer.bench.side_by_side import Key, measure_in_turn
    from twinfer.bench.switches import SWITCHES, switched_off
    from twinfer.bench.targets import own

    bench_options.say("measuring this machine's limits")
    limits = measure_limits()
    candidates, _ = own_candidates(checkpoint, plan, bench_options.say)
    kinds: list[tuple[str, Storage, str, str | None]]
    kinds = [(own(storage), storage, "compiled", None) for storage in plan.storages]
    for storage, switch in ((each, switch) for each in plan.storages for switch in SWITCHES if switches):
        implementation = f"without {switch.name}"
        bench_options.say(f"compiling {storage} {implementation}: {switch.without}")
        kinds.append((f"{own(storage)} {implementation}", storage, implementation, switch.without))
        candidates[kinds[-1][0]] = switched_off(checkpoint.source, storage, switch)
    workloads = dict.fromkeys(candidates, plan.workloads)
    samples = samples_of(candidates, workloads, checkpoint.config.vocabulary)
    measured = measure_in_turn(samples, plan.rounds, report=bench_options.say)
    about = About(
        name=checkpoint.name,
        config=checkpoint.config,
        machine=this_machine(),
        limits=limits,
        baseline=own(plan.storages[0]),
    )
    return [
        row(
            Key(name, workload.title),
            workload,
            measured,
            about if note is None else replace(about, baseline=own(storage)),
            storage=storage,
            implementation=implementation,
            repro=plan.repro("model", model, storage) + (" --switches" if switches else ""),
            note=note,
        )
        for name, storage, implementation, note in kinds
        for workload in plan.workloads
    ]


def with_footprint(row: "Row", footprints: "Mapping[str, Footprint]") -> "Row":
    """The row of one sequence's decoding with its storage's footprint; others as they are."""
    if row.storage not in footprints or not row.shape["steps"] or row.shape["batch"] > 1:
        return row
    footprint = footprints[row.storage]
    return replace(
        row,
        compile_cold_s=footprint.compile_cold_s,
        compile_warm_s=footprint.compile_warm_s,
        peak_memory_bytes=footprint.peak_bytes,
    )


def as_json(rows: "Sequence[Row]", footprints: "Sequence[Footprint]") -> dict[str, Any]:
    """What --json prints."""
    return {
        "rows": [asdict(row) for row in rows],
        "subprocess": [{**asdict(each), "allowed_bytes": each.allowed_bytes} for each in footprints],
    }
