"""What draws of many cases show together, and each of them does not."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.case import Case, RandomPicker
from twinfer.oracle.check import check_op
from twinfer.oracle.guarantees import Statistical, chi_square_p_value
from twinfer.oracle.search import drawn
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import Trial
from twinfer.reference.sampling import draw

EVENLY = Statistical(probability=lambda exact: exact["probability_V"], samples=500)


def evidence(candidate: Any, cases: int) -> list[Tensor]:
    """Of draws from as many distributions of five outcomes."""
    found = []
    for seed in range(cases):
        generator = torch.Generator().manual_seed(seed)
        probability_V = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), -1)
        given = {"probability_V": probability_V, "generator": generator}
        verdict = EVENLY.judge(Trial(Case(op="none", sizes={}, seed=seed), given, draw, candidate, ("",)))
        assert not verdict.failed
        assert verdict.evidence is not None
        found.append(verdict.evidence)
    return found


def leaning(probability_V: Tensor, generator: torch.Generator) -> int:
    """One draw in six is made again if it was of the second half."""
    outcome = draw(probability_V, generator)
    again = float(torch.rand((), generator=generator)) < 1 / 6
    return draw(probability_V, generator) if again and outcome > 2 else outcome


def test_a_lean_too_faint_for_any_case_shows_in_all_together() -> None:
    """500 draws say nothing of it; 100 000 do, and right draws pass."""
    assert EVENLY.pooled(evidence(leaning, 200)).failed
    assert not EVENLY.pooled(evidence(draw, 200)).failed


def test_nothing_drawn_is_nothing_wrong() -> None:
    assert not EVENLY.pooled([]).failed


@pytest.mark.parametrize("op", ["draw", "sample"])
def test_draws_of_a_check_are_enough_for_3_percent_and_not_for_ever(op: str) -> None:
    """From 40 000 to 1 000 000 a thousand cases, some cases of `draw` with 100 000."""
    samples = [
        int(case.options.get("samples") or OPS[op].guarantee.samples)  # type: ignore[attr-defined]
        for case in (drawn(OPS[op], 0, number)[0] for number in range(1000))
    ]
    assert 3e4 < sum(samples) < 1e6
    assert max(samples) == (100_000 if op == "draw" else 200)
    assert OPS[op].cases(RandomPicker(0)).options.get("samples") is None


def test_two_hits_of_a_long_tail_are_no_alarm() -> None:
    """2 of 40 draws hit outcomes of 0.0022 together, which happens once in 270; chi-square said once in 10**10."""
    probability_V = torch.tensor([0.99777, *[0.00223 / 24] * 24], dtype=torch.float64)
    count_V = torch.zeros(25)
    count_V[0], count_V[7], count_V[11] = 38, 1, 1
    rare = sum(math.comb(40, hits) * 0.00223**hits * 0.99777 ** (40 - hits) for hits in range(2, 41))
    assert chi_square_p_value(count_V, probability_V) == pytest.approx(2 * rare, rel=1e-9)
    assert check_op("draw", OPS["draw"].reference, 400).holds


def test_a_tail_hit_ten_times_as_often_as_it_should_is_seen() -> None:
    """20 of 1000 draws hit outcomes that are expected twice."""
    probability_V = torch.tensor([0.998, *[0.002 / 10] * 10], dtype=torch.float64)
    count_V = torch.tensor([980.0, *[2.0] * 10])
    assert chi_square_p_value(count_V, probability_V) < 1e-9
