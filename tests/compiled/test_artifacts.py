"""Programs kept on disk: found again only for what they were compiled from, and never trusted when damaged."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.compiled import artifacts as artifacts
from twinfer.compiled.programs import graph


def program(weights: tuple[Tensor, Tensor | None], x_TM: Tensor) -> Tensor:
    product = x_TM @ weights[0]
    return product if weights[1] is None else product + weights[1]


def arguments(*, tokens: int = 5, biased: bool = True, marked: bool = True) -> tuple[Any, ...]:
    x_TM = torch.arange(tokens * 4.0).view(tokens, 4)
    if marked:
        torch._dynamo.mark_dynamic(x_TM, 0)
    return (torch.arange(12.0).view(4, 3), torch.ones(3) if biased else None), x_TM


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No program is kept when a test begins."""
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "kept")
    return tmp_path / "kept"


def ready(given: tuple[Any, ...], described: str = "") -> tuple[Callable[..., Tensor], list[str]]:
    told: list[str] = []
    return artifacts.load_or_compile(graph(program), given, described, told.append), told


def test_a_kept_program_is_loaded_and_gives_the_same_bits(empty: Path) -> None:
    """For the sizes that it was compiled with and for others; nothing is left beside the finished file."""
    compiled, told = ready(arguments())
    assert told == ["once; later starts find it in the cache"]
    loaded, told = ready(arguments(tokens=9))
    assert told == []
    assert [each.suffix for each in empty.iterdir()] == [".pt2"]
    for tokens in (2, 5, 9):
        given = arguments(tokens=tokens)
        right = program(*given)
        assert torch.equal(compiled(*given), right)  # small integers: exact in any order
        assert torch.equal(loaded(*given), right)


def test_it_is_found_only_for_what_it_was_compiled_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = artifacts._key(arguments(), "decode")
    assert artifacts._key(arguments(tokens=7), "decode") == plain

    weight, x_TM = torch.zeros(4, 4), torch.zeros(4, 4)
    variants = {
        "what is described": artifacts._key(arguments(), "prefill"),
        "a size that is not marked": artifacts._key(arguments(marked=False), "decode"),
        "another such size": artifacts._key(arguments(marked=False, tokens=7), "decode"),
        "an absent weight": artifacts._key(arguments(biased=False), "decode"),
        "two tensors": artifacts._key(((weight, None), x_TM), "decode"),
        "one tensor twice": artifacts._key(((weight, None), weight), "decode"),
        "dtype": artifacts._key(((weight.double(), None), x_TM), "decode"),
        "stride": artifacts._key(((weight.t(), None), torch.zeros(8, 8)[::2, ::2]), "decode"),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    variants["threads"] = artifacts._key(arguments(), "decode")
    torch.set_num_threads(threads)
    with torch._inductor.config.patch(max_autotune=True):
        variants["a setting"] = artifacts._key(arguments(), "decode")
    (tmp_path / "attention.py").write_text("causal = False")
    monkeypatch.setattr(artifacts, "_SOURCES", (*artifacts._SOURCES, tmp_path))
    artifacts._machine.cache_clear()
    variants["the source"] = artifacts._key(arguments(), "decode")
    monkeypatch.undo()
    artifacts._machine.cache_clear()
    assert len({plain, *variants.values()}) == 1 + len(variants), variants
    assert artifacts._key(arguments(), "decode") == plain


def test_another_process_finds_it() -> None:
    """The key does not depend on the order of a set or on an address."""
    command = [sys.executable, "-c", "from twinfer.compiled import artifacts; print(artifacts._key((1, None), 'x'))"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == artifacts._key((1, None), "x")


@pytest.mark.parametrize(
    "damage", [lambda kept: kept[:-1], lambda kept: kept[:99] + b"?" + kept[100:], lambda kept: b""]
)
def test_a_damaged_file_is_said_and_replaced(empty: Path, damage: Callable[[bytes], bytes]) -> None:
    """Nothing of it is unpickled, whatever its bytes say."""
    _, _ = ready(arguments())
    (file,) = empty.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    compiled, (reason,) = ready(arguments())
    assert "is damaged" in reason
    assert str(file) in reason
    assert torch.equal(compiled(*arguments()), program(*arguments()))
    _, told = ready(arguments())
    assert told == []


def test_files_exchanged_by_name_are_said_and_replaced(empty: Path) -> None:
    """A whole program of the same user under another program's name is not run in its place."""
    _, _ = ready(arguments())
    _, _ = ready(arguments(biased=False))
    one, other = empty.iterdir()
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    for biased in (True, False):
        given = arguments(biased=biased)
        compiled, (reason,) = ready(given)
        assert "is damaged" in reason
        assert torch.equal(compiled(*given), program(*given))
        assert ready(given)[1] == []


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def test_what_is_not_ours_is_not_unpickled(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither bytes with another digest nor, though its digest is right, a file of another user."""
    _, _ = ready(arguments())
    (file,) = empty.iterdir()
    body = pickle.dumps(Bomb(tmp_path / "mark"))
    file.write_bytes(bytes(32) + body)
    _, (reason,) = ready(arguments())
    assert "is damaged" in reason
    assert not (tmp_path / "mark").exists()

    file.write_bytes(artifacts._digest(file.stem, body) + body)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    _, (reason,) = ready(arguments())
    assert "belongs to another user" in reason
    assert not (tmp_path / "mark").exists()


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(artifacts, "folder", lambda: tmp_path / "file" / "kept")
    compiled, told = ready(arguments())
    assert len(told) == 1
    assert torch.equal(compiled(*arguments()), program(*arguments()))


def test_caches_can_be_disabled(empty: Path) -> None:
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled, told = ready(arguments())
    assert told == ["caches are disabled"]
    assert not empty.exists()
    assert torch.equal(compiled(*arguments()), program(*arguments()))
