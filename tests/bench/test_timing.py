"""Timing in turn, quantiles, and what happens to a candidate that compiles while it is timed."""

import statistics
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.bench import timing
from twinfer.bench.timing import Timing, geometric_mean, interleave, paired_ratios, quantile, sample_of

_seconds = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=20)


@given(values=_seconds, share=st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    expected = float(np.quantile(values, share))
    assert abs(quantile(values, share) - expected) <= 4 * np.finfo(float).eps * max(values)


@given(values=_seconds)
def test_the_geometric_mean_is_that_of_statistics(values: list[float]) -> None:
    expected = statistics.geometric_mean(values)
    assert abs(geometric_mean(values) - expected) <= 1e-12 * expected  # both sum up to 20 logarithms below 21


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is slow for a round is slow for both."""
    base = Timing(seconds=(2.0, 20.0, 2.0), calls=1)
    assert paired_ratios(base, Timing(seconds=(1.0, 10.0, 4.0), calls=1)) == [2.0, 2.0, 0.5]


def test_candidates_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round, the first of which does not count, calls each its number of times; the time is that of one call."""
    monkeypatch.setattr(timing, "_calls_of_a_sample", lambda candidate, on_gpu: 2 if candidate is a else 1)
    clock, called = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def a() -> None:
        called.append("a")
        clock[0] += 3

    def b() -> None:
        called.append("b")
        clock[0] += 5

    timings = interleave({"a": sample_of(a), "b": sample_of(b)}, rounds=2)
    assert "".join(called) == 3 * "aab"
    assert timings["a"] == Timing(seconds=(3.0, 3.0), calls=2)
    assert timings["b"] == Timing(seconds=(5.0, 5.0), calls=1)


def test_a_sample_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def taking(seconds: float) -> int:
        def call() -> None:
            clock[0] += seconds

        return timing._calls_of_a_sample(call, on_gpu=False)

    assert taking(1.0) == 1
    assert 4 <= taking(0.5e-3) <= 5
    assert taking(1e-6) * 1e-6 >= timing.LEAST_SAMPLE_S


def _scaled(x: Tensor, factor: int) -> Tensor:
    return x * factor


def test_what_recompiles_while_it_is_timed_fails_by_name() -> None:
    """It drops out; the others are timed."""
    compiled = torch.compile(_scaled, backend="eager", dynamic=False)
    calls = 0

    def growing() -> None:
        nonlocal calls
        calls += 1
        time.sleep(timing.LEAST_SAMPLE_S)  # so that a sample is one call, and torch's limit of programs is not reached
        compiled(torch.ones(2), calls)

    still = torch.compile(lambda x: x + 1, backend="eager")
    timings = interleave({"growing": sample_of(growing), "still": sample_of(lambda: still(torch.ones(2)))}, rounds=3)
    error = timings["growing"].error
    assert error is not None
    assert "growing recompiled while it was timed" in error
    assert "_scaled" in error
    assert timings["growing"].seconds == ()
    assert timings["still"].error is None
    assert len(timings["still"].seconds) == 3


def test_other_failures_are_not_hidden() -> None:
    calls = 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        time.sleep(timing.LEAST_SAMPLE_S)
        if calls > 3:
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        interleave({"failing": sample_of(failing)}, rounds=1)
