"""What a stranger's tokenizer may cost: its files are refused where a small one would take gigabytes or hours.

The library makes tables of as many rows as the largest token id, and its normalizers may each replace one letter by
many: eight that make ten of one make a hundred million of one. (Its patterns are bounded by the library itself.)
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from ..spec.errors import CheckpointError

MOST_IDS = 1 << 24
"""Token ids run below this; the largest vocabularies there are have 2**20."""
GROWTH, FREE_CHARACTERS = 10, 100_000
"""Characters that normalizing may make of each character, and besides; what Unicode's forms add is not counted."""
DECODER_GROWTH = 1000
"""Characters that a decoder's replacements may make of one."""


class Step:
    """One step of normalizing, and how much it may lengthen a text."""

    def __init__(self, described: Mapping[str, Any]):
        self._described = described
        model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        alone = {"version": "1.0", "added_tokens": [], "model": model, "normalizer": described}
        self.normalizer: Any = tokenizers.Tokenizer.from_str(json.dumps(alone)).normalizer

    def length_after(self, text: str) -> int:
        """At most how many characters it makes of the text, Unicode's own forms aside."""
        described = self._described
        match described["type"]:
            case "Replace":
                pattern = described["pattern"].get("String")
                matches = len(text) + 1 if pattern is None else text.count(pattern)
                return len(text) + matches * (len(described["content"]) - len(pattern or ""))
            case "Precompiled":
                signs = Counter(text).items()
                return sum(times * len(self.normalizer.normalize_str(sign)) for sign, times in signs)
            case "Prepend":
                return len(text) + len(described["prepend"])
            case _:
                return len(text)


def check_sizes(described: Any) -> None:
    """Raise `CheckpointError` where a tokenizer.json holds huge ids, or replacements that multiply."""
    if not isinstance(described, dict):
        return  # the library says what is wrong
    added = [token for token in described.get("added_tokens") or () if isinstance(token, dict)]
    model = described.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    largest = max((i for i in [*ids, *(token.get("id") for token in added)] if isinstance(i, int)), default=0)
    if largest >= MOST_IDS:
        raise CheckpointError(f"the tokenizer holds token id {largest}; ids must be below {MOST_IDS}")
    factor = 1.0
    for step in decoder_steps(described.get("decoder")):
        if step.get("type") == "Replace":
            factor *= max(1.0, len(step["content"]) / max(1, len(step["pattern"].get("String", ""))))
    if factor > DECODER_GROWTH:
        raise CheckpointError(
            f"the tokenizer's decoder may make {factor:g} characters of one; it may make {DECODER_GROWTH}"
        )
    steps = growing_steps(described.get("normalizer"))
    for token in added:
        if token.get("normalized"):  # then it is normalized as the file is read
            check_growth(steps, token["content"])


def decoder_steps(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a decoder that is described as JSON, those of sequences one by one."""
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from decoder_steps(step)
    elif decoder is not None:
        yield decoder


def growing_steps(normalizer: Mapping[str, Any] | None) -> list[Step]:
    """Return the steps of a normalizer that is described as JSON; none where each makes but a few characters of one."""
    steps = list(_steps(normalizer))
    return [Step(step) for step in steps] if any(_grows(step) for step in steps) else []


def check_growth(steps: Sequence[Step], text: str) -> None:
    """Raise `CheckpointError`, before it is made, for a text that normalizing makes too long."""
    most = GROWTH * len(text) + FREE_CHARACTERS
    for step in steps:
        if (length := step.length_after(text)) > most:
            raise CheckpointError(
                f"the tokenizer's normalizers may make {length} characters of a text; they may make {most} of it"
            )
        text = step.normalizer.normalize_str(text)


def _steps(normalizer: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if normalizer is not None and normalizer["type"] == "Sequence":
        for step in normalizer["normalizers"]:
            yield from _steps(step)
    elif normalizer is not None:
        yield normalizer


def _grows(step: Mapping[str, Any]) -> bool:
    if step["type"] == "Replace":
        return len(step["content"]) > max(1, len(step["pattern"].get("String", "")))
    return step["type"] in ("Precompiled", "Prepend")
