"""False alarms, counted over as many runs as one likes: right implementations judged on cases never drawn before.

    python -m twinfer.oracle.alarms FILE [MINUTES]

adds to the counts in FILE (made where there is none), goes on where the last run stopped, and prints the table of all
runs. Every round judges so many cases of each variant of each op; the file is written after each op.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .case import RandomPicker
from .guarantees import Statistical
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


Counts = dict[str, Count]


def one_more_round(op: Op, count: Count) -> Count:
    """Judge every variant on the cases that follow those counted."""
    cases = max(1, ROUND // 20) if isinstance(op.guarantee, Statistical) else ROUND
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


def counted(ops: Mapping[str, Op], counts: Counts, more: Callable[[], bool]) -> Iterator[Counts]:
    """Go round the ops while there may be more, and yield the counts after each; the least counted comes first."""
    while more():
        name = min(ops, key=lambda name: counts.get(name, Count()).cases * (20 if _statistical(ops[name]) else 1))
        counts = {**counts, name: one_more_round(ops[name], counts.get(name, Count()))}
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
    beside.write_text(json.dumps({name: asdict(count) for name, count in counts.items()}, indent=1))
    beside.replace(file)


def main(file: Path, minutes: float = 5.0) -> int:
    """Count until the time is over; 1 if anything right was alarmed at, in this run or before."""
    end = time.monotonic() + 60 * minutes
    counts = before = read(file)
    for latest in counted(OPS, before, lambda: time.monotonic() < end):
        counts = latest
        write(file, counts)
    print(f"{'op':20} {'cases':>7} {'pairs':>7} {'alarms':>6} {'rejected':>8} {'error/bound':>11}")
    for name, count in counts.items():
        figures = f"{count.cases:7} {count.pairs:7} {len(count.alarms):6} {count.rejected:8}"
        print(f"{name:20} {figures} {count.largest_ratio:11.3f}")
        for alarm in count.alarms[:1]:
            print(f"    {alarm}")
    return 1 if any(count.alarms for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *(float(argument) for argument in sys.argv[2:3])))
