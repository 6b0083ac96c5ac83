"""One storage in processes of its own: what the processes are given, and what is made of what they tell."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from twinfer.bench.apart import Outcome, Task, main, measure, measure_apart
from twinfer.bench.exported import write_gguf
from twinfer.compiled import path as compiled_path
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.errors import MachineError, TwinferError

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
def children(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Task, str]]]:
    """Have the processes tell these things, one after the other; the result is what they are given."""

    def prepared(*told: CompletedProcess[str]) -> list[tuple[Task, str]]:
        given: list[tuple[Task, str]] = []
        following = iter(told)

        def run(command: list[str], *, env: dict[str, str], **_: object) -> CompletedProcess[str]:
            assert command[:3] == [sys.executable, "-m", "twinfer.bench.apart"]
            given.append((Task(**json.loads(command[3])), env["TORCHINDUCTOR_CACHE_DIR"]))
            assert os.path.isdir(env["TORCHINDUCTOR_CACHE_DIR"])
            return next(following)

        monkeypatch.setattr(subprocess, "run", run)
        return given

    return prepared


def told(result: Outcome | dict[str, str], status: int = 0) -> CompletedProcess[str]:
    printed = json.dumps(result if isinstance(result, dict) else asdict(result))
    return CompletedProcess([], status, stdout=f"something else\n{printed}\n")


def test_the_second_process_finds_what_the_first_has_left(children: Callable[..., list[tuple[Task, str]]]) -> None:
    given = children(told(outcome()), told(outcome(compile_s=2.0, peak_bytes=450 * MIB)))
    figures = measure_apart("tiny", "int8", 32, 24)
    (cold, cold_cache), (warm, warm_cache) = given
    assert cold == Task(model="tiny", storage="int8", prompt=32, steps=24, start_compiler=True)
    assert warm == replace(cold, start_compiler=False)
    assert cold_cache == warm_cache
    assert not os.path.exists(cold_cache)
    assert (figures.compile_cold_s, figures.compile_warm_s) == (20.0, 2.0)
    assert (figures.peak_bytes, figures.beyond_torch_bytes) == (450 * MIB, 150 * MIB)
    assert figures.allowed_bytes == 300 * MIB
    assert figures.outside_kernels == pytest.approx(0.04, rel=1e-9)


def test_memory_that_the_system_does_not_tell_is_none(children: Callable[..., list[tuple[Task, str]]]) -> None:
    children(told(outcome()), told(outcome(bare_bytes=None, peak_bytes=None)))
    assert measure_apart("tiny", "int8", 32, 24).beyond_torch_bytes is None


@pytest.mark.parametrize(
    ("child", "error", "text"),
    [
        (told({"error": "there is no model 'tiny'"}), TwinferError, "there is no model 'tiny'"),
        (told(outcome(), status=-9), MachineError, "int8: its process was killed by SIGKILL; is there enough memory"),
        (told(outcome(), status=-4), MachineError, "killed by SIGILL, for an instruction that this machine does not"),
        (told(outcome(), status=-40), MachineError, "killed by signal 40"),
        (told(outcome(), status=1), RuntimeError, "its own traceback is above"),
    ],
)
def test_a_process_that_fails_is_heard(
    child: CompletedProcess[str],
    error: type[Exception],
    text: str,
    children: Callable[..., list[tuple[Task, str]]],
) -> None:
    children(child)
    with pytest.raises(error, match=text):
        measure_apart("tiny", "int8", 32, 24)


@pytest.mark.usefixtures("uncompiled")
def test_what_a_process_measures(tiny: str) -> None:
    """On the path as it is before compiling: it has no kernels, so all of a step is outside them."""
    found = measure(Task(model=tiny, storage="int8", prompt=9, steps=3, start_compiler=False), bare_bytes=7)
    assert 0 < found.outside_s < found.step_s
    assert 0 < found.step_s < 60
    assert found.loops_a_layer == 0
    assert found.bare_bytes == 7
    assert found.weight_bytes > 0


@pytest.mark.usefixtures("uncompiled")
def test_a_process_prints_what_it_measured_or_why_not(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (tiny, "no such model"):
        task = json.dumps({"model": model, "storage": "float32", "prompt": 9, "steps": 3, "start_compiler": False})
        monkeypatch.setattr(sys, "argv", ["apart", task])
        main()
    measured, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert Outcome(**measured).step_s > 0
    assert "there is no model 'no such model'" in error["error"]
