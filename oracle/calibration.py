"""How good the guarantees are: do they let every right implementation pass, and catch every seeded fault?

    python -m twinfer.oracle.calibration [PAIRS]

prints both tables; PAIRS right implementations and cases are judged for each op (default 1000, about two minutes).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from .case import RandomPicker
from .check import described
from .guarantees import Statistical
from .op import Op
from .table import OPS
from .trial import Status, Verdict


@dataclass(frozen=True, kw_only=True)
class AlarmRow:
    """What right implementations of an op were told."""

    op: str
    guarantee: str
    pairs: int
    rejected: int
    largest_ratio: float
    alarms: tuple[str, ...]
    """Each failure, which is a false one."""


@dataclass(frozen=True, kw_only=True)
class FaultRow:
    """In how many of the cases a seeded fault was caught."""

    op: str
    fault: str
    caught: int
    cases: int


def false_alarms(op: Op, pairs: int) -> AlarmRow:
    """Judge right implementations on drawn cases; a Statistical op on a twentieth, as each judgment is many calls."""
    pairs = max(1, pairs // 20) if isinstance(op.guarantee, Statistical) else pairs
    judged = list(islice(_right(op), pairs))
    return AlarmRow(
        op=op.name,
        guarantee=described(op),
        pairs=len(judged),
        rejected=sum(verdict.status is Status.REJECTED for _, verdict in judged),
        largest_ratio=max(verdict.ratio for _, verdict in judged),
        alarms=tuple(f"{where}: {verdict.complaint} {verdict.details}" for where, verdict in judged if verdict.failed),
    )


def _right(op: Op) -> Iterator[tuple[str, Verdict]]:
    for seed in count():
        case = op.draw(RandomPicker(seed))
        for name, implementation in op.variants.items():
            yield f"{name} on {case!r}", op.guarantee.judge(op.trial(implementation, case))


def fault_caught(op: Op, fault: str, cases: int) -> FaultRow:
    """Judge a seeded fault on drawn cases, many of which it does not concern (a dropped bias where there is none)."""
    drawn = (op.draw(RandomPicker(seed)) for seed in range(cases))
    caught = sum(op.guarantee.judge(op.trial(op.mutants[fault], case)).failed for case in drawn)
    return FaultRow(op=op.name, fault=fault, caught=caught, cases=cases)


def main(pairs: int = 1000, cases: int = 100) -> int:
    """Print both tables; 1 if anything is alarmed at or missed."""
    good = True
    print(f"{'op':20} {'guarantee':42} {'pairs':>7} {'alarms':>6} {'rejected':>8} {'error/bound':>11}")
    for op in OPS.values():
        alarm = false_alarms(op, pairs)
        good = good and not alarm.alarms
        figures = f"{alarm.pairs:7} {len(alarm.alarms):6} {alarm.rejected:8} {alarm.largest_ratio:11.3f}"
        print(f"{alarm.op:20} {alarm.guarantee:42} {figures}")
    print(f"\n{'op':20} {'seeded fault':42} {'caught in':>12}")
    for op in OPS.values():
        for fault in op.mutants:
            row = fault_caught(op, fault, cases)
            good = good and row.caught > 0
            print(f"{row.op:20} {row.fault:42} {row.caught:5} of {row.cases}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:2])))
