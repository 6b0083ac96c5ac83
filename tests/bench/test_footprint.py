"""One storage in subprocesses: what they are given, and what is made of what they measure."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from twinfer.bench import footprint
from twinfer.bench.footprint import Outcome, Task, measure, measure_footprint
from twinfer.bench.peers.exported import write_gguf
from twinfer.compiled import path as compiled_path
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.errors import TwinferError

from .tiny_llama import llama

MIB = 2**20


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    write_gguf(RandomSource(llama(), seed=3), tmp_path / "tiny.gguf")
    return str(tmp_path / "tiny.gguf")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_path, "CompiledPath", partial(CompiledPath, mode="eager"))


def outcome(**changes: Any) -> Outcome:
    told = {"compile_s": 20.0, "weight_bytes": 100 * MIB, "step_s": 0.01, "outside_s": 0.0004, "loops_a_layer": 6.0}
    return Outcome(**{**told, "bare_bytes": 300 * MIB, "peak_bytes": 500 * MIB, **changes})


@pytest.fixture
def subprocesses(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Task, str]]]:
    """Have the subprocesses measure these things, one after the other; the result is what they are given."""

    def prepared(*measured: Outcome) -> list[tuple[Task, str]]:
        given: list[tuple[Task, str]] = []
        following = iter(measured)

        def run(function: object, task: Task, *, what: str, environment: dict[str, str]) -> Outcome:
            assert (function, what) == (measure, task.storage)
            assert os.path.isdir(environment["TORCHINDUCTOR_CACHE_DIR"])
            given.append((task, environment["TORCHINDUCTOR_CACHE_DIR"]))
            return next(following)

        monkeypatch.setattr(footprint, "run_in_subprocess", run)
        return given

    return prepared


def test_the_second_process_finds_what_the_first_has_left(subprocesses: Callable[..., list[tuple[Task, str]]]) -> None:
    given = subprocesses(outcome(), outcome(compile_s=2.0, peak_bytes=450 * MIB))
    figures = measure_footprint("tiny", "int8", 32, 24)
    (cold, cold_cache), (warm, warm_cache) = given
    assert cold == Task(model="tiny", storage="int8", prompt=32, steps=24, start_compiler=True)
    assert warm == replace(cold, start_compiler=False)
    assert cold_cache == warm_cache
    assert not os.path.exists(cold_cache)
    assert (figures.compile_cold_s, figures.compile_warm_s) == (20.0, 2.0)
    assert (figures.peak_bytes, figures.beyond_torch_bytes) == (450 * MIB, 150 * MIB)
    assert figures.allowed_bytes == 300 * MIB
    assert figures.outside_kernels == pytest.approx(0.04, rel=1e-9)


def test_memory_that_the_system_does_not_tell_is_none(subprocesses: Callable[..., list[tuple[Task, str]]]) -> None:
    subprocesses(outcome(), outcome(bare_bytes=None, peak_bytes=None))
    assert measure_footprint("tiny", "int8", 32, 24).beyond_torch_bytes is None


@pytest.mark.usefixtures("uncompiled")
def test_what_a_process_measures(tiny: str) -> None:
    """On the path as it is before compiling: it has no kernels, so all of a step is outside them."""
    found = measure(Task(model=tiny, storage="int8", prompt=9, steps=3, start_compiler=False))
    assert 0 < found.outside_s < found.step_s
    assert 0 < found.step_s < 60
    assert found.loops_a_layer == 0
    assert found.weight_bytes > 0


def test_a_subprocess_says_why_it_cannot_measure() -> None:
    with pytest.raises(TwinferError, match="there is no model 'no such model'"):
        measure_footprint("no such model", "int8", 32, 24)
