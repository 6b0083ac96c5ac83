"""Rows of two runs side by side: what became slower, beyond noise?

Machines drift, so seconds of two runs prove nothing by themselves. Each run times, in turn with every implementation,
the baseline and the machine's fastest ways to read and to multiply. A row is slower if all of these say so:

    times the baseline   new 80th percentile < old 20th percentile * (1 - MARGIN); ratios of one round to its own
    share of the limit   new, at its 20th percentile of seconds < old, at its 80th, * (1 - MARGIN)
    seconds              new 20th percentile > old 80th + CALL_S; on the same machine only

so the spreads must lie apart, and by more than what two runs of the same code differ beyond their spreads: where memory
happens to lie changes from process to process, not from round to round. No single one is right. Where the baseline's
temporaries just fit a cache that other programs share, it was seen to be 2.7 times as fast an hour later; where memory
became slow, what waits for it lost a quarter against a baseline that computes. Faster is the same, old for new. (What
became slower by as much as the machine became faster stays unseen.) Of another machine a warning tells.

Becoming wrong, or failing to run, is a regression too. What looks slower is measured once more, and the second time
counts: another program's load passes, a regression stays.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ..spec.errors import RequestError
from .limits import share_of_limit
from .rows import Accuracy, Row

MARGIN = 0.1
CALL_S = 3e-6
"""How much the call of a compiled function, 10 microseconds or so, was seen to differ from process to process."""


class Verdict(StrEnum):
    SLOWER = "slower"
    WRONG = "wrong"
    """Passed the oracle before, and does not now."""
    BROKEN = "broken"
    """Ran before, and does not now."""
    FASTER = "faster"
    SAME = "same"


REGRESSIONS = frozenset({Verdict.SLOWER, Verdict.WRONG, Verdict.BROKEN})


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row of both runs."""

    old: Row
    new: Row
    verdict: Verdict

    @property
    def text(self) -> str:
        """One line."""
        if self.new.error is not None:
            return f"{self.new.title}: {self.verdict}: {self.new.error}"
        figures = f"{_spread(self.old)} -> {_spread(self.new)} times {self.new.baseline}"
        return f"{self.new.title}: {self.verdict}: {figures}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    changes: tuple[Change, ...]
    only_old: tuple[str, ...]
    """Titles of timed rows that this run did not measure."""
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.verdict in REGRESSIONS)


def compare(old: Sequence[Row], new: Sequence[Row]) -> Comparison:
    """Match rows by what they measure, and judge each pair. Raises `RequestError` where no row is in both runs."""
    measured = {row.identity: row for row in new}
    pairs = [(row, measured[row.identity]) for row in old if row.identity in measured]
    if not pairs:
        raise RequestError("no row of the old file was measured again; measure the same ops, shapes and storages")
    return Comparison(
        changes=tuple(
            Change(old=before, new=after, verdict=judge(before, after))
            for before, after in pairs
            if before.speed_up is not None and before.implementation != before.baseline
        ),
        only_old=tuple(row.title for row in old if row.identity not in measured and row.speed_up is not None),
        warnings=tuple(_warnings([before for before, _ in pairs], [after for _, after in pairs])),
    )


def judge(old: Row, new: Row) -> Verdict:
    """What became of a row that had a speed-up."""
    if new.speed_up_p20 is None or new.speed_up_p80 is None or old.speed_up_p20 is None or old.speed_up_p80 is None:
        return Verdict.BROKEN
    if old.accuracy is Accuracy.PASSED and new.accuracy is Accuracy.FAILED:
        return Verdict.WRONG
    if _slower(old, new):
        return Verdict.SLOWER
    if _slower(new, old):
        return Verdict.FASTER
    return Verdict.SAME


def _slower(before: Row, after: Row) -> bool:
    """Whether every measure that there is says that a row takes longer than it did."""
    ratio = _fell(before.speed_up_p20, after.speed_up_p80)
    share = _fell(_share(before, before.p80_s), _share(after, after.p20_s))
    longer = None
    if before.machine == after.machine and before.p80_s is not None and after.p20_s is not None:
        longer = after.p20_s > before.p80_s + CALL_S
    return ratio is True and share is not False and longer is not False


def _fell(before: float | None, after: float | None) -> bool | None:
    return None if before is None or after is None else after < before * (1 - MARGIN)


def _share(row: Row, seconds: float | None) -> float | None:
    if seconds is None or row.bytes is None or row.flops is None or row.limits is None:
        return None
    return share_of_limit(row.bytes, row.flops, seconds, row.limits)


def _warnings(old: Iterable[Row], new: Iterable[Row]) -> Iterable[str]:
    """What else differs between the runs; ratios are compared all the same."""
    for what in ("processor", "gpu", "instructions", "threads", "torch"):
        before, after = ({getattr(row.machine, what) for row in rows} for rows in (old, new))
        if before != after:
            yield f"{what} was {_listed(before)} and is {_listed(after)}: another machine may well have other ratios"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, values)))


def _spread(row: Row) -> str:
    return f"{row.speed_up:.3g} ({row.speed_up_p20:.3g} .. {row.speed_up_p80:.3g})"
