"""The fuzzer itself: a short run of it, and that it sees what it looks for."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from twinfer.spec.errors import CheckpointError

from . import child
from .__main__ import OUTCOMES, Child, print_table
from .child import mutant_random
from .damage import damaged

CHECKOUT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and forked children: Linux")


@linux
def test_a_few_hundred_mutants_are_refused_or_read() -> None:
    """In a process of its own, as a person runs it: its children are forked, which threads of other tests forbid."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path[1:])}
    command = [sys.executable, "-m", "tests.fuzz", "--count", "520", "--seed", "1"]
    run = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "520 mutants" in run.stdout


def test_a_mutant_is_drawn_by_its_number_alone(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + bytes(range(256)) * 20)
    copies = []
    for index in (3, 3, 4):
        folder = tmp_path / str(len(copies))
        folder.mkdir()
        copies.append(damaged(model, folder, mutant_random(0, index)).read_bytes())
    assert copies[0] == copies[1] != copies[2]


def refuse(path: Path) -> str:
    raise CheckpointError("no")


def refuse_in_two_lines(path: Path) -> str:
    raise CheckpointError("no\nreally")


def fail(path: Path) -> str:
    raise KeyError("no")


def sleep(path: Path) -> str:
    time.sleep(60)
    return "late"


def take(path: Path) -> str:
    return str(np.ones(2**30).sum())


@linux
@pytest.mark.parametrize(
    ("behavior", "outcome"),
    [
        (refuse, "handled"),
        (lambda path: "usual", "same"),
        (lambda path: "unusual", "other"),
        (fail, "crash"),
        (refuse_in_two_lines, "handled"),
        (lambda path: os.kill(os.getpid(), signal.SIGKILL), "crash"),
        (lambda path: sys.exit(0), "crash"),
        (sleep, "hang"),
        (take, "memory"),
    ],
    ids=["refusal", "usual", "unusual", "exception", "two lines", "signal", "exit", "slow", "large"],
)
def test_every_outcome_is_told_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behavior: Callable[[Path], str], outcome: str
) -> None:
    """Of a mutant that behaves so; the next one is tried all the same."""
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(100))
    monkeypatch.setattr(child, "answer", lambda path: "usual" if path == model else behavior(path))
    process = Child([model], seed=0, seconds=1)
    try:
        assert [process.tried(index)[0] for index in range(2)] == [outcome] * 2
    finally:
        process.stop()


def test_the_table_counts_by_model_and_in_all(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Counter({("a", "same"): 2, ("b", "hang"): 1}), ["a", "b"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [[*OUTCOMES], ["a", *"020000"], ["b", *"000010"], ["all", *"020010"]]
