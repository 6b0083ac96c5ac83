"""Turns, pauses and errors of timing whole models, with candidates that take as long as they are told."""

import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from twinfer.bench import side_by_side, timing
from twinfer.bench.side_by_side import Key, ModelSample, Workload, greedy, measure_in_turn, prompt, sample

A, B = Key("a", "decode batch 1"), Key("b", "decode batch 1")


class Clock:
    """Time that only passes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(side_by_side, "time", clock)
    monkeypatch.setattr(timing, "time", clock)
    return clock


class Fake:
    """Takes 10 seconds for a prompt, 2 for every step after it, and as much again for every further sequence."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        for step in range(new):
            self.clock.now += batch * (10.0 if step == 0 else 2.0)
            yield [step] * batch


def numbered(calls: list[str], name: str, seconds: list[float]) -> ModelSample:
    following = iter(seconds)

    def take() -> float:
        calls.append(name)
        return next(following)

    return ModelSample(take=take, tokens=4)


def test_a_prompt_is_timed_without_steps_and_steps_without_the_prompt(clock: Clock) -> None:
    prompt_T = prompt(50, 7)
    assert sample(Fake(clock), prompt_T, Workload(prompt=7)).take() == 10.0
    assert clock.now == 20.0, "it is read once before"
    assert sample(Fake(clock), prompt_T, Workload(prompt=7, steps=5)).take() == 2.0
    assert sample(Fake(clock), prompt_T, Workload(prompt=7, steps=5, batch=3)).take() == 6.0


def test_tokens_are_those_of_a_step_or_of_a_prompt(clock: Clock) -> None:
    assert sample(Fake(clock), prompt(50, 7), Workload(prompt=7)).tokens == 7
    assert sample(Fake(clock), prompt(50, 7), Workload(prompt=7, steps=5, batch=3)).tokens == 3


class ElsewhereTimed:
    """A candidate that says how long it took; nobody else reads a clock or steps through its answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Workload]] = []

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        raise AssertionError("its answer is not what is timed")

    def seconds(self, prompt_T: Tensor, workload: Workload) -> float:
        self.asked.append((prompt_T.tolist(), workload))
        return 7.0


def test_who_times_itself_is_believed(clock: Clock) -> None:
    candidate, workload, prompt_T = ElsewhereTimed(), Workload(prompt=7, steps=5, batch=3), prompt(50, 7)
    taken = sample(candidate, prompt_T, workload)
    assert candidate.asked == []
    assert taken.take() == 7.0
    assert candidate.asked == [(prompt_T.tolist(), workload)]
    assert (taken.tokens, clock.now) == (3, 0.0)


def test_prompts_begin_alike() -> None:
    assert torch.equal(prompt(50, 300)[:32], prompt(50, 32))
    assert len(set(prompt(50, 300).tolist())) > 10


def test_greedy_tokens_are_those_of_the_first_sequence(clock: Clock) -> None:
    assert greedy(Fake(clock), prompt(50, 7), 4) == [0, 1, 2, 3]


def test_rounds_take_turns_and_the_first_is_not_counted(clock: Clock) -> None:
    calls: list[str] = []
    samples = {A: numbered(calls, "a", [100.0, 1.0, 2.0, 8.0]), B: numbered(calls, "b", [100.0, 4.0, 4.0, 4.0])}
    measured = measure_in_turn(samples, 3)
    assert calls == ["a", "b"] * 4
    assert measured[A].timing.seconds == (1.0, 2.0, 8.0)
    assert measured[A].rates == [4.0, 2.0, 0.5]
    assert measured[B].timing.error is None


@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_peer_that_fails_has_a_reason_and_the_rest_goes_on(clock: Clock, fails_at: int) -> None:
    calls: list[str] = []

    def take() -> float:
        if calls.count("b") == fails_at:
            raise OSError("no\nroom")
        return 1.0

    measured = measure_in_turn({A: ModelSample(take=take), B: numbered(calls, "b", [1.0] * 4)}, 3, may_fail={"a"})
    assert measured[A].timing.error == "OSError: no room"
    assert measured[A].rates == []
    assert measured[B].timing.seconds == (1.0, 1.0, 1.0)


def test_what_may_not_fail_raises(clock: Clock) -> None:
    def take() -> float:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        measure_in_turn({A: ModelSample(take=take)}, 3, may_fail={"b"})


def test_compiling_in_a_counted_round_is_an_error(clock: Clock) -> None:
    """Even of one that may not fail, and by name."""
    program = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    sizes = iter([3, 3, 4, 5])

    def take() -> float:
        program(torch.ones(next(sizes)))
        return 1.0

    measured = measure_in_turn({A: ModelSample(take=take), B: ModelSample(take=lambda: 2.0)}, 3)
    error = measured[A].timing.error
    assert error is not None
    assert "recompile" in error
    assert measured[A].rates == []
    assert measured[B].timing.seconds == (2.0, 2.0, 2.0)


def test_there_is_a_pause_between_samples(clock: Clock) -> None:
    measure_in_turn({A: ModelSample(take=lambda: 1.0), B: ModelSample(take=lambda: 1.0)}, 3)
    assert clock.now == pytest.approx(8 * side_by_side.PAUSE_S, abs=1e-12)
    assert time.perf_counter() > 0
