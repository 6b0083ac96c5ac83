"""Tokenizer files that would cost much: refused in a line, before they do."""

import json
from pathlib import Path
from typing import Any

import pytest

from twinfer.checkpoint.tokenizer import read_tokenizer
from twinfer.memory import peak_memory_bytes
from twinfer.spec.errors import CheckpointError


def tokenizer_file(folder: Path, **parts: Any) -> Path:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | parts))
    return path


def replace_by(content: str, pattern: str = "a") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def added(token: int, content: str, *, normalized: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": token, "content": content, "normalized": normalized, **flags}


TENFOLD = {"type": "Sequence", "normalizers": [replace_by("a" * 10)] * 8}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 2**31}, "merges": []}}, "token id 2147483648; ids must be"),
        ({"added_tokens": [added(2**31, "<x>", normalized=False)]}, "token id 2147483648; ids must be below 16777216"),
        ({"normalizer": TENFOLD, "added_tokens": [added(2, "aaa", normalized=True)]}, "normalizers may make 300"),
        ({"decoder": {"type": "Sequence", "decoders": [replace_by("a" * 10)] * 8}}, "decoder may make 1e\\+08 char"),
    ],
)
def test_files_that_cost_much_are_refused(parts: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A tokenizer file of a few hundred bytes cannot take gigabytes when it is read, written or decodes."""
    before = peak_memory_bytes()
    with pytest.raises(CheckpointError, match=message):
        read_tokenizer(tokenizer_file(tmp_path, **parts), "fetch it again")
    assert (peak_memory_bytes() or 0) - (before or 0) < 2**26


@pytest.mark.parametrize(
    ("normalizer", "message"),
    [
        (TENFOLD, "may make 1000000 characters of a text; they may make 100100 of it"),
        ({"type": "Sequence", "normalizers": [TENFOLD, {"type": "NFC"}]}, "may make 1000000 characters"),
        (replace_by("a" * 100_000), "may make 1000000 char"),
        ({"type": "Replace", "pattern": {"Regex": "a*"}, "content": "a" * 100_000}, "may make 1100010 char"),
        ({"type": "Prepend", "prepend": "a" * 200_000}, "may make 200010 char"),
    ],
)
def test_normalizers_that_multiply_are_bounded(normalizer: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A text becomes at most ten times as long, and 100 000 characters longer; shorter ones pass as they are."""
    tokenizer = read_tokenizer(tokenizer_file(tmp_path, normalizer=normalizer), "fetch it again")
    before = peak_memory_bytes()
    with pytest.raises(CheckpointError, match=message):
        tokenizer.encode("a" * 10)
    assert (peak_memory_bytes() or 0) - (before or 0) < 2**26


def test_normalizers_that_lengthen_a_little_are_used(tmp_path: Path) -> None:
    """Growing by a few characters each, as in honest files, is no fault."""
    steps = [replace_by("bb"), replace_by("c ", "b"), {"type": "Prepend", "prepend": "b "}]
    normalizer = {"type": "Sequence", "normalizers": steps}
    pre_tokenizer = {"type": "Whitespace"}
    tokenizer = read_tokenizer(tokenizer_file(tmp_path, normalizer=normalizer, pre_tokenizer=pre_tokenizer), "")
    assert tokenizer.encode("a") == [1, 0, 0]
