"""`twinfer demo`: one trained model, two paths, the same tokens, and how much faster the second is."""

import argparse
import sys
from dataclasses import asdict, dataclass

from rich.table import Table

from twinfer import reference as reference_package
from twinfer.spec.errors import CheckpointError

from ..loading import load
from ..measuring import Measurement, Task, measure_in_subprocess
from .console import print_json, print_table, waiting
from .options import add_json

MODEL, OFFLINE = "smollm2", "tiny-moe"
"""Shown where no model is given: the second where the first is neither there nor can be fetched."""
QUESTIONS = {MODEL: "What is the capital of France?", OFFLINE: "In the beginning"}
"""Models and what each is asked; tiny-moe, which knows no conversations, continues it."""
PATHS = ("reference", "compiled")
STORAGES = ("float32", "int8")
"""The paths are compared in each: equal storage means equal weights."""

NAME, HELP = "demo", "start here: a trained model on both paths, compared"
DESCRIPTION = f"""\
Fetch a small trained model ({MODEL}, 93 MB) if it is not there yet, ask it a question on the reference path and on the
compiled path, and check that both give the same tokens: with float32 weights, and again with int8 weights. Each path
runs in a process of its own, so that peak memory is its own. Where {MODEL} cannot be fetched, {OFFLINE} is taken, a
mixture of experts that comes with twinfer.
"""

EPILOG = """\
exit status: 0 if the tokens are the same or differ by an admissible tie, which is then printed; 1 if not

with --json, one object: {"model", "question", "same_tokens": {storage: true or false}, "ties": {storage: text or null},
  "measurements": [{"path", "storage", "answer", "answer_ids", "continuation_ids", "load_s", "compile_s",
    "prefill_tokens_per_s", "decode_tokens_per_s", "peak_memory_bytes", ...}]}
"""

TRY_NEXT = """\
Try next:
  twinfer generate {model}{chat} --prompt "{prompt}"
  twinfer generate {model} --storage int8 --prompt "Once upon a time"
  twinfer verify {model} --storage int8
  twinfer inspect {model}
  twinfer ops
  less {reference}/layer.py
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=QUESTIONS, help=f"default: {MODEL}, or {OFFLINE} where that is neither there nor in reach"
    )
    add_json(parser)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether both paths gave the same tokens, in one storage."""

    same: bool
    tie: str | None
    """Where they differ only by two tokens too close for rounding to tell apart: which, and how close."""
    words: str

    @property
    def holds(self) -> bool:
        return self.same or self.tie is not None


def run(args: argparse.Namespace) -> int:
    model = _fetched(args.model)
    measured = {storage: [_measure(model, path, storage) for path in PATHS] for storage in STORAGES}
    verdicts = {storage: _judge(model, storage, *twins) for storage, twins in measured.items()}
    if args.json:
        print_json(
            {
                "model": model,
                "question": QUESTIONS[model],
                "same_tokens": {storage: verdict.same for storage, verdict in verdicts.items()},
                "ties": {storage: verdict.tie for storage, verdict in verdicts.items()},
                "measurements": [asdict(measurement) for twins in measured.values() for measurement in twins],
            }
        )
    else:
        _tell(model, measured, verdicts)
    return 0 if all(verdict.holds for verdict in verdicts.values()) else 1


def _fetched(chosen: str | None) -> str:
    """Return the model's name, once it is there."""
    from twinfer.checkpoint import open_model

    try:
        with waiting() as report:
            open_model(chosen or MODEL, report=report)
    except CheckpointError as error:
        if chosen is not None:
            raise
        print(f"{MODEL} cannot be used ({error}); {OFFLINE} is shown instead", file=sys.stderr, flush=True)
        return OFFLINE
    return chosen or MODEL


def _measure(model: str, path: str, storage: str) -> Measurement:
    print(f"{path} path, {storage} weights ...", file=sys.stderr, flush=True)
    return measure_in_subprocess(Task(model=model, path=path, storage=storage, question=QUESTIONS[model]))


def _judge(model: str, storage: str, reference: Measurement, compiled: Measurement) -> Verdict:
    """Compare the answer, then the continuation of the timed prompt, up to the first token that differs."""
    pairs = [
        ("answer", reference.question_ids, reference.answer_ids, compiled.answer_ids),
        ("continuation", reference.timed_ids, reference.continuation_ids, compiled.continuation_ids),
    ]
    for what, prompt, one, other in pairs:
        if one != other:
            agree = _agreement(one, other)
            tie = admissible_tie(model, storage, prompt, agree + 1)
            tokens = f"{one[agree : agree + 1]} against {other[agree : agree + 1]}"
            words = f"the {what} agrees for {agree} tokens, then {tokens}"
            explained = f"an admissible tie: {tie}" if tie else "DIFFERENT tokens, which no tie explains"
            return Verdict(same=False, tie=tie, words=f"{storage}: {words}: {explained}")
    counts = " and ".join(f"{len(one)} of the {what}" for what, _, one, _ in pairs)
    return Verdict(same=True, tie=None, words=f"{storage}: same tokens on both paths ({counts})")


def admissible_tie(model: str, storage: str, prompt: list[int], new_tokens: int) -> str | None:
    """The near-tie at which greedy text parts from float64 truth, if rounding alone can explain the difference."""
    from twinfer.oracle.baseline import Baseline
    from twinfer.oracle.paths import free_run

    with waiting() as report:
        loaded = load(model, "compiled", storage, batches=False, report=report, routes=True)
        baseline = Baseline.of(loaded.checkpoint.source, storage=loaded.storage)
        runs = [free_run(baseline, path, prompt, new_tokens) for path in (baseline.eager[0], loaded.decoder)]
    ties = [str(run.tie) for run in runs if run.tie is not None]
    return "; ".join(ties) if ties and all(run.holds for run in runs) else None


def _agreement(one: list[int], other: list[int]) -> int:
    """How many tokens agree from the start."""
    different = (index for index in range(min(len(one), len(other))) if one[index] != other[index])
    return next(different, min(len(one), len(other)))


def _tell(model: str, measured: dict[str, list[Measurement]], verdicts: dict[str, Verdict]) -> None:
    reference, compiled = measured["float32"]
    quantized = measured["int8"][1]
    print(f"\nQ: {QUESTIONS[model]}")
    print(f"A: {compiled.answer}  (compiled, float32)")
    print(f"A: {quantized.answer}  (compiled, int8)\n")
    for verdict in verdicts.values():
        print(verdict.words)
    print_table(_table([reference, compiled, quantized]))
    print(
        f"Decoding, compiled against reference: {_ratio(compiled, reference)} in float32, "
        f"{_ratio(quantized, reference)} in int8.\n"
    )
    chat, prompt = (" --chat", "Explain rain to a child.") if model == MODEL else ("", QUESTIONS[model])
    print(TRY_NEXT.format(model=model, chat=chat, prompt=prompt, reference=reference_package.__path__[0]), end="")


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
