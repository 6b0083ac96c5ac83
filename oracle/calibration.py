"""How good the guarantees are: do they let every right implementation pass, and catch every seeded fault?

    python -m twinfer.oracle.calibration [PAIRS [CASES]]

prints both tables: PAIRS right implementations and cases are judged for each op, and each fault until it is caught, on
CASES at most (default 1000 and 1000, about ten minutes). How small an error is seen: `twinfer.oracle.resolution`.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice

from .case import RandomPicker
from .check import described
from .guarantees import Statistical
from .mutations import Family, caught_after, mutants
from .op import Op
from .search import drawn as draw_case
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


def caught_by_family(ops: Iterable[Op], cases: int = 1000) -> tuple[dict[Family, tuple[int, int]], list[str]]:
    """How many faults of each family the guarantees catch, of how many; and the names of those missed."""
    caught: Counter[Family] = Counter()
    seeded: Counter[Family] = Counter()
    missed = []
    for op in ops:
        drawn = cache(lambda number, op=op: draw_case(op, 0, number)[0])
        for mutant in mutants(op):
            seeded[mutant.family] += 1
            if caught_after(mutant, op, cases, drawn) is None:
                missed.append(f"{op.name}: {mutant.name} ({mutant.family})")
            else:
                caught[mutant.family] += 1
    return {family: (caught[family], seeded[family]) for family in Family if seeded[family]}, missed


def main(pairs: int = 1000, cases: int = 1000) -> int:
    """Print both tables; 1 if anything is alarmed at or missed."""
    good = True
    print(f"{'op':20} {'guarantee':52} {'pairs':>7} {'alarms':>6} {'rejected':>8} {'error/bound':>11}")
    for op in OPS.values():
        alarm = false_alarms(op, pairs)
        good = good and not alarm.alarms
        figures = f"{alarm.pairs:7} {len(alarm.alarms):6} {alarm.rejected:8} {alarm.largest_ratio:11.3f}"
        print(f"{alarm.op:20} {alarm.guarantee:52} {figures}", flush=True)
        for complaint in alarm.alarms[:1]:
            print(f"    {complaint}")
    families, missed = caught_by_family(OPS.values(), cases)
    print(f"\n{'faults':12} {'caught':>7} {'of':>5}")
    for family, (caught, seeded) in families.items():
        print(f"{family:12} {caught:7} {seeded:5}")
    for name in missed:
        print(f"    missed {name}")
    return 0 if good and not missed else 1


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:3])))
