"""False alarms, counted over as many runs as one likes: right implementations judged on cases never drawn before.

    python -m twinfer.oracle.alarms FILE [MINUTES [NAME ...]]

adds to the counts in FILE (made where there is none), goes on where the last run stopped, and prints the table of all
runs. A name is an op's, or `models_float32` and the like for whole models with experts (`model_alarms`); without names
all are counted. Every round judges so many cases of each variant of an op; the file is written after each.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..spec.errors import RequestError
from ..spec.naming import dtype_name
from .case import RandomPicker
from .guarantees import Statistical
from .model_alarms import COMPUTE, ModelCount, judge_model
from .op import Op
from .table import OPS
from .trial import Status

ROUND = 40
"""Cases of a variant in a round; of a Statistical op two, as each judgment is many calls."""
_FIRST_SEED = 1_000_000
"""Far from the seeds that tests and the calibration draw."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """What the right implementations of an op were told so far."""

    cases: int = 0
    """Of each variant."""
    pairs: int = 0
    """Of a case and a variant."""
    rejected: int = 0
    largest_ratio: float = 0.0
    alarms: tuple[str, ...] = ()
    rows: int = 0
    """Of whole models: rows judged; a pair is a prompt on a path."""
    choices: int = 0
    """Of whole models: choices of experts compared."""
    route_ties: int = 0
    """Of whole models: choices that are others than the truth's, and admissible; or not reported, and near."""
    left_out: int = 0
    """Of whole models: rows behind a near-tie that the path does not report."""


Counts = dict[str, Count]
Round = Callable[[Count], Count]
"""Judges some more cases, and adds them to the count."""


def one_more_round(op: Op, count: Count) -> Count:
    """Judge every variant on the cases that follow those counted."""
    cases = max(1, ROUND // 20) if _statistical(op) else ROUND
    for seed in range(_FIRST_SEED + count.cases, _FIRST_SEED + count.cases + cases):
        case = op.draw(RandomPicker(seed))
        for name, variant in op.variants.items():
            verdict = op.guarantee.judge(op.trial(variant, case))
            alarm = (f"{name} on {case!r}: {verdict.complaint}",) if verdict.failed else ()
            count = replace(
                count,
                pairs=count.pairs + 1,
                rejected=count.rejected + (verdict.status is Status.REJECTED),
                largest_ratio=count.largest_ratio if verdict.failed else max(count.largest_ratio, verdict.ratio),
                alarms=(*count.alarms, *alarm),
            )
    return replace(count, cases=count.cases + cases)


def one_more_model(compute: torch.dtype, count: Count) -> Count:
    """Judge right paths of the model that follows those counted."""
    seen: ModelCount = judge_model(_FIRST_SEED + count.cases, compute)
    return Count(
        cases=count.cases + 1,
        pairs=count.pairs + seen.pairs,
        largest_ratio=max(count.largest_ratio, seen.largest_ratio),
        alarms=(*count.alarms, *seen.alarms),
        rows=count.rows + seen.rows,
        choices=count.choices + seen.choices,
        route_ties=count.route_ties + seen.route_ties,
        left_out=count.left_out + seen.left_out,
    )


def rounds() -> dict[str, tuple[Round, int]]:
    """What is counted, by name: what judges one more round, and how many cases a round has."""
    of_ops: dict[str, tuple[Round, int]] = {
        name: (partial(one_more_round, op), max(1, ROUND // 20) if _statistical(op) else ROUND)
        for name, op in OPS.items()
    }
    return of_ops | {f"models_{dtype_name(each)}": (partial(one_more_model, each), 1) for each in COMPUTE}


def counted(given: Mapping[str, tuple[Round, int]], counts: Counts, more: Callable[[], bool]) -> Iterator[Counts]:
    """Go round what is given while there may be more, the least counted first, and yield the counts after each."""
    while more():
        name = min(given, key=lambda name: counts.get(name, Count()).cases / given[name][1])
        counts = {**counts, name: given[name][0](counts.get(name, Count()))}
        yield counts


def _statistical(op: Op) -> bool:
    return isinstance(op.guarantee, Statistical)


def read(file: Path) -> Counts:
    """The counts of a file; none where there is no file."""
    if not file.exists():
        return {}
    return {
        name: Count(**{**fields, "alarms": tuple(fields["alarms"])})
        for name, fields in json.loads(file.read_text()).items()
    }


def write(file: Path, counts: Counts) -> None:
    """Replace the file as a whole, so that a run that is cut off leaves the last counts."""
    beside = file.with_suffix(".new")
    plain = {
        name: {key: each for key, each in asdict(count).items() if _told(key, each)} for name, count in counts.items()
    }
    beside.write_text(json.dumps(plain, indent=1))
    beside.replace(file)


def _told(key: str, value: object) -> bool:
    """What only whole models have is left out of an op's count."""
    return bool(value) or key not in ("rows", "choices", "route_ties", "left_out")


def main(file: Path, minutes: float = 5.0, names: Sequence[str] = ()) -> int:
    """Count until the time is over; 1 if anything right was alarmed at, in this run or before."""
    given = rounds()
    unknown = [name for name in names if name not in given]
    if unknown:
        raise RequestError(f"{unknown[0]!r} is not counted; what is: {', '.join(given)}")
    chosen = {name: given[name] for name in names} if names else given
    end = time.monotonic() + 60 * minutes
    counts = before = read(file)
    for latest in counted(chosen, before, lambda: time.monotonic() < end):
        counts = latest
        write(file, counts)
    print(f"{'op':20} {'cases':>7} {'pairs':>7} {'alarms':>6} {'rejected':>8} {'error/bound':>11}")
    for name, count in counts.items():
        figures = f"{count.cases:7} {count.pairs:7} {len(count.alarms):6} {count.rejected:8}"
        print(f"{name:20} {figures} {count.largest_ratio:11.3f}")
        for alarm in count.alarms[:1]:
            print(f"    {alarm}")
    return 1 if any(count.alarms for count in counts.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count false alarms of the oracle on cases never drawn before.")
    parser.add_argument("file", type=Path, help="the counts, added to; made where there are none")
    parser.add_argument("minutes", type=float, nargs="?", default=5.0, help="how long to count (default %(default)s)")
    parser.add_argument("names", nargs="*", help="ops, or models_float32 and the like (default all)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(**vars(_arguments())))
