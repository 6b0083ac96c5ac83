"""Decode and prefill speed of this project's paths beside transformers, interleaved in one process.

Machines drift, so what counts is the ratio: every round times every candidate once, in turn, and the figures are
medians over the rounds.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec.decoder import Decoder

DECODE_STEPS = 24
DECODE_PROMPT = 32


class Candidate(Protocol):
    """Something that can be timed: prompts and steps of one sequence."""

    def prefill(self, token_T: Tensor) -> float:
        """Seconds to read a prompt and give the logits after its last token, the cache's allocation included."""
        ...

    def decode(self, prompt_T: Tensor, steps: int) -> float:
        """Seconds for each of `steps` single-token steps after a prompt, on average; the prompt is not counted."""
        ...


class PathCandidate:
    """A `Decoder` of this project."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def prefill(self, token_T: Tensor) -> float:
        def read() -> None:
            sequences = self._decoder.open(1, len(token_T))
            self._decoder.extend(sequences, [token_T])
            sequences.close()

        return _seconds(read)

    def decode(self, prompt_T: Tensor, steps: int) -> float:
        sequences = self._decoder.open(1, len(prompt_T) + steps)
        logits_BV = self._decoder.extend(sequences, [prompt_T])

        def step_on() -> None:
            following_BV = logits_BV
            for _ in range(steps):
                following_BV = self._decoder.extend(sequences, [following_BV.argmax(-1)])

        seconds = _seconds(step_on)
        sequences.close()
        return seconds / steps


class TransformersCandidate:
    """transformers in eager mode, with its default cache and attention, logits for the last position only."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.no_grad()
    def prefill(self, token_T: Tensor) -> float:
        return _seconds(lambda: self._model(token_T[None], use_cache=True, logits_to_keep=1))

    @torch.no_grad()
    def decode(self, prompt_T: Tensor, steps: int) -> float:
        out = self._model(prompt_T[None], use_cache=True, logits_to_keep=1)

        def step_on() -> None:
            following = out
            for _ in range(steps):
                token_BT = following.logits[:, -1:].argmax(-1)
                following = self._model(
                    token_BT, past_key_values=following.past_key_values, use_cache=True, logits_to_keep=1
                )

        return _seconds(step_on) / steps


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds of one candidate, a figure a round."""

    decode_s: list[float] = field(default_factory=list)
    prefill_s: dict[int, list[float]] = field(default_factory=dict)

    @property
    def decode_tokens_per_s(self) -> float:
        return 1 / statistics.median(self.decode_s)

    def prefill_tokens_per_s(self, length: int) -> float:
        return length / statistics.median(self.prefill_s[length])


def measure(
    candidates: dict[str, Candidate], vocabulary: int, lengths: list[int], rounds: int, report: Callable[[str], None]
) -> dict[str, Speeds]:
    """Time every candidate `rounds` times in turn, after one uncounted round."""
    generator = torch.Generator().manual_seed(0)
    prompts = {n: torch.randint(vocabulary, (n,), generator=generator) for n in {DECODE_PROMPT, *lengths}}
    speeds = {name: Speeds(prefill_s={length: [] for length in lengths}) for name in candidates}
    for turn in range(rounds + 1):
        report(f"round {turn} of {rounds}" + (" (warm-up, not counted)" if turn == 0 else ""))
        for name, candidate in candidates.items():
            decode_s = candidate.decode(prompts[DECODE_PROMPT], DECODE_STEPS)
            prefill_s = {length: candidate.prefill(prompts[length]) for length in lengths}
            if turn:
                speeds[name].decode_s.append(decode_s)
                for length in lengths:
                    speeds[name].prefill_s[length].append(prefill_s[length])
    return speeds


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
