"""Candidates for timing on a prompt: this project's paths, and whatever else answers as they do.

Each picks the likeliest token after the prompt and after each token, so all do the same work on the same ids.

Shapes: T prompt tokens, B sequences.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from ..spec.decoder import Decoder


class Candidate(Protocol):
    """A model somewhere, ready to answer."""

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        """Read the prompt, in `batch` sequences alike, and give `new` greedy tokens of each, one step at a time.

        The first step reads the prompt, whatever has to be allocated for it included.
        """
        ...


class PathCandidate:
    """A `Decoder` of this project."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        sequences = self._decoder.open(batch, len(prompt_T) + new)
        try:
            given = [prompt_T] * batch
            for _ in range(new):
                token_B = self._decoder.extend(sequences, given).argmax(-1)
                yield token_B.tolist()
                given = list(token_B[:, None])
        finally:
            sequences.close()
