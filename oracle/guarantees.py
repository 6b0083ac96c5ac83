"""The guarantees that are not error budgets: identical bits, identical decisions, a tested distribution."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Data, Inputs
from .trial import PASSED, Status, Trial, Verdict, failure, same_bits
from .ulp import named_index


@dataclass(frozen=True, kw_only=True)
class Bitwise:
    """Identical bits, NaN and signs of zeros included."""

    def judge(self, trial: Trial) -> Verdict:
        misfit = trial.misfit()
        if misfit is not None:
            return misfit
        for axes, got, wanted in zip(trial.outputs, trial.got, trial.eager, strict=True):
            if not same_bits(got, wanted):
                differs = (got != wanted) & ~(got.isnan() & wanted.isnan())
                if not differs.any():
                    return failure("differs in the sign of a zero or the payload of a NaN, and promises identical bits")
                return failure(
                    f"differs in {int(differs.sum())} of {differs.numel()} elements, and promises identical bits",
                    _first(axes, differs, got, wanted),
                )
        return PASSED


def _first(axes: str, differs: Tensor, got: Tensor, wanted: Tensor) -> str:
    at = tuple(differs.nonzero()[0].tolist())
    return f"first at   {named_index(axes, at)}: candidate {got[at].item()!r}, reference {wanted[at].item()!r}"


Regret = Callable[[Inputs, list[Tensor]], Tensor]
"""From the float64 inputs and the candidate's outputs: by how much each of its decisions falls short of the best one.

Zero for a best decision, infinite for a result that no tie can explain.
"""


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """Identical decisions, unless the float64 gap between the best and the chosen is within the sum of both budgets."""

    regret: Regret
    scale: Callable[[Inputs], Tensor]
    """The size of what is rounded on the way to the compared scores; broadcasts to the regret."""
    eps: float = torch.finfo(torch.float32).eps
    """Of the arithmetic that scores the options."""
    c: float = 2.0
    exact_on_integers: bool = True
    """Whether scores of integers are exact, so that ties are true ties and the tie rule alone decides."""

    def judge(self, trial: Trial) -> Verdict:
        misfit = trial.misfit()
        if misfit is not None:
            return misfit
        if all(torch.equal(got, wanted) for got, wanted in zip(trial.got, trial.eager, strict=True)):
            return PASSED
        if self.exact_on_integers and trial.case.data is Data.INTEGER:
            return failure(
                "decides differently on integers, where scores are exact and ties have a rule", *self._first(trial)
            )
        regret = self.regret(trial.exact_inputs, trial.got)
        both_budgets = 2 * self.c * self.eps * self.scale(trial.exact_inputs)
        ratios = regret / both_budgets.clamp_min(torch.finfo(torch.float32).smallest_normal)
        ratio = float(ratios.nan_to_num(nan=torch.inf, posinf=torch.inf).max())  # no number is no proof
        if ratio <= 1:
            return Verdict(status=Status.PASSED, ratio=ratio)
        return failure(
            f"decides differently, and not for a tie: its choice is worse by {float(regret.max()):.4g}, "
            f"{ratio:.3g} times what both budgets allow",
            *self._first(trial),
            ratio=ratio,
        )

    def _first(self, trial: Trial) -> list[str]:
        for axes, got, wanted in zip(trial.outputs, trial.got, trial.eager, strict=True):
            differs = got != wanted
            if differs.any():
                return [_first(axes, differs, got, wanted)]
        return []


@dataclass(frozen=True, kw_only=True)
class Statistical:
    """A distribution: the candidate is called `samples` times, and its counts are held against the true probabilities.

    The op must take a `generator` and return an integer. Pearson's chi-square over the outcomes expected at least five
    times, the rest pooled, and judged exactly where all of it is expected more rarely; fails below `significance`, so a
    right implementation fails once in about 1 / significance cases. What is too faint for one case shows in all of them
    together: `pooled`.
    """

    probability: Callable[[Inputs], Tensor]
    """The true distribution [V], from the float64 inputs."""
    samples: int = 200
    significance: float = 1e-9

    def judge(self, trial: Trial) -> Verdict:
        probability_V = self.probability(trial.exact_inputs)
        calls = trial.drawn(int(trial.case.options.get("samples") or self.samples))
        if calls.complaint is not None:
            return failure(calls.complaint)
        outcome_N = torch.tensor(calls.result)
        possible_N = (outcome_N >= 0) & (outcome_N < len(probability_V))
        possible_N = possible_N & (probability_V[outcome_N.where(possible_N, 0)] > 0)
        if not possible_N.all():
            return failure(f"returns {int(outcome_N[~possible_N][0])}, which has probability 0")
        count_V = outcome_N.bincount(minlength=len(probability_V)).double()
        expected_V = len(outcome_N) * probability_V
        p_value = chi_square_p_value(count_V, probability_V)
        if p_value >= self.significance:
            evidence = _places(outcome_N, probability_V, trial.case.generator("places"))
            return Verdict(status=Status.PASSED, ratio=self.significance / p_value, evidence=evidence)
        worst = int((count_V - expected_V).abs().argmax())
        return failure(
            f"does not follow the distribution: counts this far off have probability {p_value:.3g}",
            f"worst at   outcome {worst}: {int(count_V[worst])} of {len(outcome_N)}, "
            f"expected {float(expected_V[worst]):.4g}",
            ratio=self.significance / max(p_value, 1e-300),
        )

    def pooled(self, evidence: list[Tensor]) -> Verdict:
        """Judge all cases together: every draw's place in its own distribution must be uniform from 0 to 1."""
        for order, place_N in zip(_ORDERS, torch.cat(evidence, -1) if evidence else (), strict=bool(evidence)):
            for parts in _PARTS:
                count_P = (place_N * parts).long().clamp_max(parts - 1).bincount(minlength=parts).double()
                p_value = chi_square_p_value(count_P, torch.full((parts,), 1 / parts))
                if not p_value >= self.significance:
                    return failure(
                        "does not follow the distributions of all cases together",
                        f"pooled     {len(place_N)} draws in the order of {order}: {parts} parts of equal probability "
                        f"hold from {int(count_P.min())} to {int(count_P.max())}, which has probability {p_value:.3g}",
                        ratio=self.significance / max(p_value, 1e-300),
                    )
        return PASSED


_ORDERS = ("token ids", "probabilities")
_PARTS = (2, 20)
"""Parts of equal probability that pooled draws are counted in: halves show a lean, more parts a bump."""


def _places(outcome_N: Tensor, probability_V: Tensor, generator: torch.Generator) -> Tensor:
    """Each draw's place in its distribution, [2, N]: outcomes in the order of their ids, and likeliest first.

    An outcome that covers from 0.2 to 0.5 of the probability is at a random place between: uniform, if the draws are
    right, whatever the distribution.
    """
    within_N = torch.rand(len(outcome_N), generator=generator, dtype=torch.float64)
    places = []
    for order_V in (torch.arange(len(probability_V)), probability_V.argsort(descending=True, stable=True)):
        in_order_V = probability_V[order_V]
        before_V = torch.empty_like(probability_V).index_copy(0, order_V, in_order_V.cumsum(0) - in_order_V)
        places.append(before_V[outcome_N] + within_N * probability_V[outcome_N])
    return torch.stack(places)


def chi_square_p_value(count_V: Tensor, probability_V: Tensor) -> float:
    """The probability of counts at least this far from expectation, if the probabilities are right.

    >>> round(chi_square_p_value(torch.tensor([60.0, 40.0]), torch.tensor([0.5, 0.5])), 4)
    0.0455
    """
    total = int(count_V.sum())
    expected_V = probability_V.double() * total
    often = expected_V >= 5
    counted, expected = count_V[often].double(), expected_V[often]
    rest, rest_expected = int(count_V[~often].sum()), float(expected_V[~often].sum())
    if rest_expected >= 5:
        counted, expected = (
            torch.cat([each, each.new_tensor([more])]) for each, more in ((counted, rest), (expected, rest_expected))
        )
    elif rest_expected > 0 and len(expected):  # chi-square says nothing of a count so rare, so it is judged exactly
        of_rest = _at_least(rest, total, rest_expected / total)
        return min(1.0, 2 * min(of_rest, _p_value(counted, expected * counted.sum() / expected.sum())))
    return _p_value(counted, expected)


def _p_value(counted: Tensor, expected: Tensor) -> float:
    if len(expected) < 2:
        return 1.0
    statistic = ((counted - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def _at_least(count: int, total: int, probability: float) -> float:
    """The probability that of so many draws at least `count` hit what has this probability.

    >>> round(_at_least(2, 3, 0.5), 6), _at_least(0, 3, 0.5)
    (0.5, 1.0)
    """
    if count == 0:
        return 1.0
    hits = torch.arange(count, total + 1, dtype=torch.float64)
    ways = torch.lgamma(torch.tensor(total + 1.0).double()) - torch.lgamma(hits + 1) - torch.lgamma(total - hits + 1)
    return float((ways + hits * math.log(probability) + (total - hits) * math.log1p(-probability)).exp().sum())
