"""Comparison with an earlier run: slower beyond noise is seen, noise is not, and other machines are said to be so."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinfer.bench.compare import CALL_S, MARGIN, Verdict, compare, judge
from twinfer.bench.rows import Accuracy, Row
from twinfer.spec.errors import RequestError

from .conftest import ROW

MakeRow = Callable[..., Row]


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((2.8, 3.0, 3.1), (1.8, 2.0, 2.1), Verdict.SLOWER),
        ((1.8, 2.0, 2.1), (2.8, 3.0, 3.1), Verdict.FASTER),
        ((2.8, 3.0, 3.1), (2.7, 2.9, 3.2), Verdict.SAME),
        ((2.0, 3.0, 4.0), (1.5, 1.9, 2.5), Verdict.SAME),  # a third slower, but both rows swing that much
        ((3.0, 3.0, 3.0), (2.75, 2.75, 2.75), Verdict.SAME),  # steady, but no more than runs differ
        ((3.0, 3.0, 3.0), (2.6, 2.6, 2.6), Verdict.SLOWER),
        ((3.0, 3.0, 3.0), (3.25, 3.25, 3.25), Verdict.SAME),
        ((3.0, 3.0, 3.0), (3.4, 3.4, 3.4), Verdict.FASTER),
    ],
)
def test_verdicts(
    make_row: MakeRow, old: tuple[float, float, float], new: tuple[float, float, float], verdict: Verdict
) -> None:
    assert judge(make_row(old), make_row(new)) is verdict


@given(
    old=st.lists(st.floats(0.01, 100), min_size=3, max_size=3).map(sorted),
    new=st.lists(st.floats(0.01, 100), min_size=3, max_size=3).map(sorted),
)
def test_slower_one_way_is_faster_the_other(old: list[float], new: list[float]) -> None:
    rows = [
        replace(
            ROW,
            speed_up_p20=ratio[0],
            speed_up=ratio[1],
            speed_up_p80=ratio[2],
            p20_s=1 / ratio[2],  # of a baseline that takes a second
            p50_s=1 / ratio[1],
            p80_s=1 / ratio[0],
        )
        for ratio in (old, new)
    ]
    there, back = judge(rows[0], rows[1]), judge(rows[1], rows[0])
    opposite = {Verdict.SLOWER: Verdict.FASTER, Verdict.FASTER: Verdict.SLOWER, Verdict.SAME: Verdict.SAME}
    assert back is opposite[there]
    assert (there is Verdict.SLOWER) == (new[2] < old[0] * (1 - MARGIN) and 1 / new[2] > 1 / old[0] + CALL_S)


def test_regressions_are_named(make_row: MakeRow) -> None:
    old = [make_row((2.8, 3.0, 3.1)), make_row((2.8, 3.0, 3.1), name="mlp")]
    new = [make_row((2.8, 3.0, 3.1)), make_row((1.0, 1.1, 1.2), name="mlp")]
    comparison = compare(old, new)
    (regression,) = comparison.regressions
    assert "mlp" in regression.text
    assert "3 (2.8 .. 3.1) -> 1.1 (1 .. 1.2) times eager" in regression.text
    assert not compare(new, old).regressions


def test_becoming_wrong_or_broken_is_a_regression(make_row: MakeRow) -> None:
    passed = make_row(accuracy=Accuracy.PASSED)
    assert judge(passed, make_row(accuracy=Accuracy.FAILED)) is Verdict.WRONG
    assert judge(passed, make_row(accuracy=Accuracy.NOT_JUDGED)) is Verdict.SAME
    broken = make_row(error="recompiled", speed_up=None, speed_up_p20=None, speed_up_p80=None)
    comparison = compare([passed], [broken])
    assert [change.verdict for change in comparison.regressions] == [Verdict.BROKEN]
    assert "recompiled" in comparison.regressions[0].text


def test_a_slow_machine_is_no_regression(make_row: MakeRow) -> None:
    """Ten times slower, but the ratios are the same."""
    slow = make_row(p20_s=1e-3, p50_s=1e-3, p80_s=1e-3)
    assert not compare([make_row()], [slow]).regressions


def test_a_quicker_baseline_is_no_regression(make_row: MakeRow) -> None:
    """Nor a slower one a gain: the row's own seconds stayed."""
    before, after = make_row((2.8, 3.0, 3.1)), make_row((1.8, 2.0, 2.1), p20_s=0.95e-4, p50_s=1e-4, p80_s=1.1e-4)
    assert judge(before, after) is Verdict.SAME
    assert judge(after, before) is Verdict.SAME


def test_seconds_count_on_the_same_machine_only(make_row: MakeRow) -> None:
    """One of twice the limits that takes as long is slower; if it is the same one, the limits were a mistake."""
    assert ROW.limits is not None
    twice = replace(ROW.limits, read_bytes_per_s=8e10, gemm_flops_per_s=4e11)
    before, after = make_row((2.8, 3.0, 3.1)), make_row((1.8, 2.0, 2.1), p20_s=0.95e-4, p80_s=1.1e-4, limits=twice)
    assert judge(before, after) is Verdict.SAME
    assert judge(before, replace(after, machine=replace(ROW.machine, processor="another CPU"))) is Verdict.SLOWER


def test_microseconds_of_a_call_are_no_regression(make_row: MakeRow) -> None:
    """But where a call takes longer, as many per cent are."""

    def row(ratio: float, seconds: float) -> Row:
        return make_row((ratio, ratio, ratio), p20_s=seconds, p50_s=seconds, p80_s=seconds)

    assert judge(row(1.0, 10e-6), row(0.8, 12.5e-6)) is Verdict.SAME
    assert judge(row(1.0, 100e-6), row(0.8, 125e-6)) is Verdict.SLOWER


def test_slow_memory_is_no_regression(make_row: MakeRow) -> None:
    """What waits for memory loses against a baseline that does not; its share of the limit stays."""
    half = replace(ROW.limits, read_bytes_per_s=2e10) if ROW.limits is not None else None
    before, after = make_row((2.8, 3.0, 3.1), bytes=10**7), make_row((1.3, 1.4, 1.5), bytes=10**7)
    assert judge(before, after) is Verdict.SLOWER
    assert judge(before, replace(after, limits=half)) is Verdict.SAME
    assert judge(before, replace(after, limits=None)) is Verdict.SLOWER


def test_another_machine_is_warned_of(make_row: MakeRow) -> None:
    other = make_row(machine=replace(ROW.machine, processor="another CPU"))
    (warning,) = compare([make_row()], [other]).warnings
    assert "another CPU" in warning
    assert "a CPU" in warning
    assert not compare([make_row()], [make_row()]).warnings


def test_rows_that_no_longer_meet(make_row: MakeRow) -> None:
    old = [make_row(), make_row(name="mlp"), make_row(name="rotate", speed_up=None)]
    assert compare(old, [make_row()]).only_old == (make_row(name="mlp").title,)
    with pytest.raises(RequestError, match="no row of the old file"):
        compare(old, [make_row(storage="float32")])
