"""The ratios that are targets, computed from given speeds."""

import pytest

from twinfer.bench.side_by_side import Key, Measured
from twinfer.bench.targets import GEMM, Target, ratio, targets
from twinfer.bench.timing import Timing
from twinfer.spec.config import Storage

OWN, OTHER, THIRD = Key("own", "x"), Key("other", "x"), Key("third", "x")


def measured(*seconds: float, tokens: int = 1, error: str | None = None) -> Measured:
    return Measured(timing=Timing(seconds=seconds, calls=1, error=error), tokens=tokens)


def wanted(bound: float, *over: Key, at_most: bool = False) -> Target:
    return Target(name="a ratio", own=OWN, over=over or (OTHER,), bound=bound, at_most=at_most)


def test_a_ratio_is_of_each_round_and_not_of_medians() -> None:
    """A machine that slows down for everyone changes nothing."""
    speeds = {OWN: measured(1.0, 10.0, 100.0), OTHER: measured(3.0, 20.0, 400.0)}
    found = ratio(wanted(3.0), speeds, {})
    assert (found.value, found.p20, found.p80) == pytest.approx((3.0, 2.4, 3.6), rel=1e-12)
    assert found.reached


def test_a_ratio_is_of_tokens() -> None:
    speeds = {OWN: measured(2.0, tokens=8), OTHER: measured(1.0, tokens=1)}
    assert ratio(wanted(4.0), speeds, {}).value == 4.0


@pytest.mark.parametrize(("bound", "at_most", "reached"), [(2.0, False, True), (2.1, False, False), (2.0, True, True)])
def test_a_bound_is_reached_when_it_is_met(bound: float, at_most: bool, reached: bool) -> None:
    speeds = {OWN: measured(1.0), OTHER: measured(2.0)}
    assert ratio(wanted(bound, at_most=at_most), speeds, {}).reached is reached


def test_more_than_at_most_is_a_miss() -> None:
    assert ratio(wanted(1.9, at_most=True), {OWN: measured(1.0), OTHER: measured(2.0)}, {}).reached is False


def test_the_best_of_several_is_the_fastest_in_most_rounds() -> None:
    speeds = {OWN: measured(1.0, 1.0, 1.0), OTHER: measured(0.1, 4.0, 4.0), THIRD: measured(2.0, 2.0, 2.0)}
    found = ratio(wanted(1.0, OTHER, THIRD), speeds, {})
    assert (found.value, found.over) == (2.0, "third")


def test_what_is_missing_is_named_with_its_reason() -> None:
    here = {OWN: measured(1.0)}
    assert ratio(wanted(1.0), here, {"other": "not installed"}).missing == "other, x: not installed"
    assert ratio(wanted(1.0), here, {}).missing == "other, x: not measured"
    failed = {OWN: measured(error="it recompiled"), OTHER: measured(1.0)}
    found = ratio(wanted(1.0), failed, {})
    assert found.missing == "own, x: it recompiled"
    assert (found.value, found.reached) == (None, None)


def test_the_promises_are_those_that_were_made() -> None:
    """Every one, with its bound, written down here a second time."""
    found = {each.name: each for each in targets(list(Storage), (512, 260, 300), (1, 8, 32), (4096, 8192))}
    bounds = {name: (each.bound, each.at_most) for name, each in found.items()}
    expected = {
        "decode batch 1, float32 over llama.cpp F32": (1.0, False),
        "decode batch 1, bfloat16 over llama.cpp F16": (1.0, False),
        "decode batch 1, int8 over llama.cpp Q8_0": (1.2, False),
        "decode batch 1, int4 over llama.cpp Q4_1": (1.2, False),
        "decode batch 1, int8 over transformers eager": (6.0, False),
        "decode batch 1, int8 over transformers static cache": (4.0, False),
        "decode batch 8, int8, all its tokens, over batch 1": (1.5, False),
        f"decode batch 32, int8, over {GEMM} of the model's shapes": (0.6, False),
        "prefill 512, float32 over llama.cpp's best": (1.2, False),
        f"prefill 512, its weight products alone, over {GEMM} of the model's shapes": (0.85, False),
    }
    for storage in Storage:
        for length in (260, 300):
            expected[f"prefill {length}, {storage} over its own 512"] = (0.85, False)
    for kind, share, times in (("float32", 0.6, 1.6), ("bfloat16", 0.6, 1.6), ("int8", 0.5, 2.0)):
        for size in (4096, 8192):
            expected[f"{size} x {size} {kind}, 1 row, over reading it"] = (share, False)
            expected[f"{size} x {size} {kind}, time of 4 rows over that of 1"] = (times, True)
    assert bounds == expected


def test_what_is_not_run_is_no_target() -> None:
    names = [each.name for each in targets([Storage.BFLOAT16], (512,), (1,), ())]
    assert names == ["decode batch 1, bfloat16 over llama.cpp F16"]


def test_each_promise_of_time_is_the_inverse_of_a_speed() -> None:
    """Four rows that take 1.5 times as long as one: 1.5."""
    (promise,) = [each for each in targets([Storage.INT8], (512,), (1,), (64,)) if each.at_most]
    one, four = promise.own, promise.over[0]
    assert ("1 row" in one.what, "4 rows" in four.what) == (True, True)
    assert ratio(promise, {one: measured(1.0), four: measured(1.5)}, {}).value == 1.5
