"""Choosing the next token: greedily, or by a seeded draw from the shaped distribution.

Every sequence has a generator of its own, seeded by (seed, prompt index) alone: what a prompt yields does not depend
on which prompts it is batched with.

Shapes: V vocabulary, T tokens so far.
"""

import hashlib
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec.errors import NumericsError, RequestError
from .logits import keep_min_p, keep_top_k, keep_top_p, penalize_repetition, scale_temperature

PENALTIES = (0.01, 100.0)
"""The least and the largest repetition penalty; what lies beyond would let the penalty alone decide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose; the filters are applied in the order of the fields below the temperature."""

    temperature: float = 0.0
    """0 takes the likeliest token, and the three filters then change nothing."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    """Applied before everything else, greedy choice included; 1 changes nothing."""

    def __post_init__(self) -> None:
        _require(0 <= self.temperature <= sys.float_info.max, "temperature", self.temperature, "0 or a positive number")
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        _require(self.top_k is None or (whole and self.top_k >= 1), "top_k", self.top_k, "an integer of at least 1")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1")
        low, high = PENALTIES
        right = f"from {low} to {high}; 1 changes nothing"
        _require(low <= self.repetition_penalty <= high, "repetition_penalty", self.repetition_penalty, right)


def generator_for(seed: int, prompt_index: int) -> torch.Generator:
    """The generator of one sequence. Seeds are hashed: neighboring pairs must not give overlapping streams."""
    digest = hashlib.sha256(f"{seed} {prompt_index}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def shape_logits(logits_V: Tensor, previous_T: Tensor, sampling: Sampling) -> Tensor:
    """The logits [V] whose softmax is sampled from; temperature 0 leaves only the repetition penalty.

    Shaping is done in float64. The largest logit is subtracted before the temperature divides, so that no temperature
    is too small: the likeliest tokens stay at 0, the others go to -inf at worst.
    """
    if sampling.repetition_penalty != 1:
        logits_V = penalize_repetition(logits_V.to(torch.float64), previous_T, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits_V
    logits_V = logits_V.to(torch.float64)
    logits_V = scale_temperature(logits_V - logits_V.max(), sampling.temperature)
    if sampling.top_k is not None:
        logits_V = keep_top_k(logits_V, sampling.top_k)
    if sampling.top_p is not None:
        logits_V = keep_top_p(logits_V, sampling.top_p)
    if sampling.min_p is not None:
        logits_V = keep_min_p(logits_V, sampling.min_p)
    return logits_V


def draw(probability_V: Tensor, generator: torch.Generator) -> int:
    """Draw a token id by inverting the distribution function, in float64: one uniform number for each token.

    Raises `NumericsError` unless the probabilities add up to a positive finite number.
    """
    cumulative_V = probability_V.to(torch.float64).cumsum(0)
    total = cumulative_V[-1]
    if not 0 < float(total) < torch.inf:
        raise NumericsError(f"the probabilities add up to {float(total)}; their sum must be positive and finite")
    threshold = torch.rand((), dtype=torch.float64, device=generator.device, generator=generator) * total
    last_possible = torch.searchsorted(cumulative_V, total)  # where rounding lifts the threshold to the total
    return int(torch.searchsorted(cumulative_V, threshold, right=True).minimum(last_possible))


def next_token(logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the token that follows; of equal logits, greedy choice takes the lowest token id.

    Raises `NumericsError` where logits, as given or as shaped, are NaN or +inf, or all are -inf: a model gone wrong
    must not look like a model that talks.
    """
    _check_largest(logits_V, "logit", "check the weights, or compute in float32")
    logits_V = shape_logits(logits_V.cpu(), previous_T.cpu(), sampling)
    _check_largest(logits_V, "logit after shaping", f"it was shaped by {sampling}")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    return draw(torch.softmax(logits_V, -1), generator)


def _check_largest(logits_V: Tensor, what: str, hint: str) -> None:
    largest = float(logits_V.max())  # NaN where any is
    if not -torch.inf < largest < torch.inf:
        raise NumericsError(f"the largest {what} is {largest}; it must be finite: {hint}")


def _require(holds: bool, name: str, value: object, right: str) -> None:
    if not holds:
        raise RequestError(f"{name} is {value!r}; it must be {right}")
