"""`twinfer demo`: one trained model, two paths, the same tokens, and how much faster the second is."""

import argparse
import sys
from dataclasses import asdict
from typing import Any

from rich.table import Table

from .cli_options import add_json
from .console import print_json, print_table, waiting
from .measuring import Measurement, Task, measure_apart

MODEL = "smollm2"
QUESTION = "What is the capital of France?"
TWINS = {
    "float32": ("reference", "compiled"),
    "int8": ("reference", "compiled"),
}
"""Storages, and the paths compared on them: equal storage means equal weights."""

DESCRIPTION = f"""\
Fetch a small trained model ({MODEL}, 93 MB) if it is not there yet, ask it a question on the reference path and on the
compiled path, and check that both give the same tokens: with float32 weights, and again with int8 weights. Each path
runs in a process of its own, so that peak memory is its own.
"""

EPILOG = """\
exit status: 0 if the tokens are the same, 1 if not

with --json, one object: {"model", "question", "same_tokens": {storage: true or false},
  "measurements": [{"path", "storage", "answer", "answer_ids", "continuation_ids", "load_s", "compile_s",
    "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", ...}]}
"""

TRY_NEXT = f"""\
Try next:
  twinfer generate {MODEL} --chat --prompt "Explain rain to a child."
  twinfer generate {MODEL} --storage int8 --prompt "Once upon a time"
  twinfer inspect {MODEL}
"""


def add_to(commands: "argparse._SubParsersAction[Any]") -> None:
    parser = commands.add_parser(
        "demo",
        help="start here: a trained model on both paths, compared",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _fetch()
    measured = {storage: [_measure(path, storage) for path in paths] for storage, paths in TWINS.items()}
    same = {storage: _same_tokens(*twins) for storage, twins in measured.items()}
    if args.json:
        everything = [asdict(measurement) for twins in measured.values() for measurement in twins]
        print_json({"model": MODEL, "question": QUESTION, "same_tokens": same, "measurements": everything})
    else:
        _tell(measured)
    return 0 if all(same.values()) else 1


def _fetch() -> None:
    from twinfer.checkpoint import open_model

    with waiting() as report:
        open_model(MODEL, report=report)


def _measure(path: str, storage: str) -> Measurement:
    print(f"{path} path, {storage} weights ...", file=sys.stderr, flush=True)
    return measure_apart(Task(model=MODEL, path=path, storage=storage, question=QUESTION))


def _same_tokens(reference: Measurement, compiled: Measurement) -> bool:
    return all(one == other for _, one, other in _pairs(reference, compiled))


def _pairs(reference: Measurement, compiled: Measurement) -> list[tuple[str, list[int], list[int]]]:
    return [
        ("answer", reference.answer_ids, compiled.answer_ids),
        ("continuation", reference.continuation_ids, compiled.continuation_ids),
    ]


def _tell(measured: dict[str, list[Measurement]]) -> None:
    reference, compiled = measured["float32"]
    quantised = measured["int8"][1]
    print(f"\nQ: {QUESTION}")
    print(f"A: {compiled.answer}  (compiled, float32)")
    print(f"A: {quantised.answer}  (compiled, int8)\n")
    for storage, twins in measured.items():
        print(_verdict(storage, *twins))
    print_table(_table([reference, compiled, quantised]))
    print(
        f"Decoding, compiled against reference: {_ratio(compiled, reference)} in float32, "
        f"{_ratio(quantised, reference)} in int8.\n"
    )
    print(TRY_NEXT, end="")


def _verdict(storage: str, reference: Measurement, compiled: Measurement) -> str:
    pairs = _pairs(reference, compiled)
    for what, one, other in pairs:
        if one != other:
            agree = _agreement(one, other)
            tokens = f"{one[agree : agree + 1]} against {other[agree : agree + 1]}"
            return f"{storage}: DIFFERENT tokens: the {what} agrees for {agree} tokens, then {tokens}"
    counts = " and ".join(f"{len(one)} of the {what}" for what, one, _ in pairs)
    return f"{storage}: same tokens on both paths ({counts})"


def _agreement(one: list[int], other: list[int]) -> int:
    """How many tokens agree from the start."""
    different = (index for index in range(min(len(one), len(other))) if one[index] != other[index])
    return next(different, min(len(one), len(other)))


def _table(measurements: list[Measurement]) -> Table:
    table = Table("path", "weights", "prefill tokens/s", "decode tokens/s", "peak memory MB", "compile s")
    for column in table.columns[2:]:
        column.justify = "right"
    for one in measurements:
        memory = None if one.peak_memory_bytes is None else one.peak_memory_bytes / 1e6
        compile_s = one.compile_s if one.path == "compiled" else None
        numbers = [one.prefill_tokens_per_s, one.decode_tokens_per_s, memory, compile_s]
        table.add_row(one.path, one.storage, *("-" if n is None else f"{n:,.1f}" for n in numbers))
    return table


def _ratio(fast: Measurement, slow: Measurement) -> str:
    if not fast.decode_tokens_per_s or not slow.decode_tokens_per_s:
        return "not measured"
    return f"{fast.decode_tokens_per_s / slow.decode_tokens_per_s:.1f} times as fast"
