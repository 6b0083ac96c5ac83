"""Processes that the system kills at drawn moments of a build and of a generation in batches: nothing lost or doubled.

By default two moments each; with HYPOTHESIS_PROFILE=exhaustive a hundred, and 30 of a build for many ranks.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings

from twinfer.batches import run_batches
from twinfer.generation import generate
from twinfer.offload.path import OffloadPath
from twinfer.offload.sequences import Away
from twinfer.offload.shares import build_shares
from twinfer.offload.store import Store, open_store
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage
from twinfer.spec.parallel import ParallelConfig

from .small import built, config, contents

MOMENTS = 100 if settings.default.max_examples > 1000 else 2
ROOT = str(Path(__file__).parents[2])
PROMPTS = [[100 * index + each for each in range(70 + 5 * index)] for index in range(7)]
NEW_TOKENS = 6
MODEL = replace(config(layers=6), context=128)

PARENT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.offload import test_kills
for line in sys.stdin:
    name, *given = line.split()
    child = os.fork()
    if child == 0:
        getattr(test_kills, name)(*given)
        os._exit(0)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Killer:
    """A process that has imported everything, and whose children are killed."""

    def __enter__(self) -> "Killer":
        command = [sys.executable, "-c", PARENT, ROOT]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __call__(self, name: str, *given: Path, after_s: float) -> None:
        """Run a function of this file in a child, and kill it so long after it has begun."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, *given, file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        assert self._process.stdout.readline() == "ended\n"


def builds(folder: str) -> None:
    """Build a store, in a child."""
    print(os.getpid(), flush=True)
    built(RandomSource(config(layers=12), 7), Path(folder))


def builds_shares(folder: str) -> None:
    """Build a store for two ranks, in a child."""
    print(os.getpid(), flush=True)
    built_shares(Path(folder))


def built_shares(folder: Path) -> None:
    given: dict[str, Any] = {"model": {"name": "m"}, "files": {"tokenizer.json": "{}"}, "identity": 1}
    source, parallel = RandomSource(config(layers=6), 7), ParallelConfig(tensor=2)
    build_shares(source, folder, Storage.INT8, parallel, **given, report=lambda line: None)


def generates(store: str, file: str) -> None:
    """Generate in batches, in a child."""
    decoder = opened(Path(store))
    print(os.getpid(), flush=True)
    ran(decoder, Path(file))


def opened(folder: Path) -> OffloadPath:
    """Open a store, half of its layers' keys and values in a file."""
    torch.set_num_threads(1)
    OffloadPath._away = lambda self, plan: Away([1, 3, 5], 0)  # type: ignore[method-assign]
    return OffloadPath(open_store(folder), MODEL, budget=50 << 20, mode="eager")


def ran(decoder: OffloadPath, file: Path) -> int:
    """Generate for the prompts whose results the file lacks, three at a time; returns how many."""

    def some(numbers: object) -> object:
        assert isinstance(numbers, list)
        prompts = [PROMPTS[number] for number in numbers]
        return generate(decoder, prompts, max_new_tokens=NEW_TOKENS, numbers=numbers).finished()

    return run_batches(file, PROMPTS, 0, 3, some, lambda line: None)  # type: ignore[arg-type]


def lines_of(file: Path) -> dict[int, object]:
    """Return the whole lines of a file of results, none of which is there twice."""
    lines = [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    found = {each["prompt"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def test_a_build_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """The next build gives the same bytes."""
    source = RandomSource(config(layers=12), 7)
    begin_s = time.perf_counter()
    built(source, tmp_path / "whole")
    whole_s = time.perf_counter() - begin_s
    expected = contents(tmp_path / "whole")
    pick = random.Random(1)
    with Killer() as kill:
        for index in range(MOMENTS):
            folder = tmp_path / f"s{index}"
            kill("builds", folder, after_s=pick.uniform(0, whole_s))
            if not folder.exists():
                built(source, folder)
            assert contents(folder) == expected


def test_a_build_for_ranks_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    """The same command gives the same bytes of all ranks, and leaves nothing beside them."""
    begin_s = time.perf_counter()
    built_shares(tmp_path / "whole")
    whole_s = time.perf_counter() - begin_s
    expected, pick = all_contents(tmp_path / "whole"), random.Random(3)
    with Killer() as kill:
        for index in range(min(MOMENTS, 30)):
            folder = tmp_path / f"s{index}"
            kill("builds_shares", folder, after_s=pick.uniform(0, whole_s))
            if not folder.exists():
                built_shares(folder)
            assert all_contents(folder) == expected
    assert all(not path.name.startswith(".") for path in tmp_path.iterdir())


def all_contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_generation_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """What had finished is not run again, and all results are those of a run that was not killed."""
    store: Store = built(RandomSource(MODEL, 7), tmp_path / "s")
    there = set(os.listdir(store.folder))
    away, decoder = OffloadPath._away, opened(store.folder)
    try:
        begin_s = time.perf_counter()
        assert ran(decoder, tmp_path / "whole") == len(PROMPTS)
        whole_s = time.perf_counter() - begin_s
        expected = lines_of(tmp_path / "whole")
        pick = random.Random(2)
        with Killer() as kill:
            for index in range(MOMENTS):
                file = tmp_path / f"out{index}"
                kill("generates", store.folder, file, after_s=pick.uniform(0, whole_s))
                finished = lines_of(file) if file.exists() else {}
                assert ran(decoder, file) == len(PROMPTS) - len(finished)
                assert lines_of(file) == expected
                assert set(os.listdir(store.folder)) == there
    finally:
        decoder.close()
        OffloadPath._away = away  # type: ignore[method-assign]
