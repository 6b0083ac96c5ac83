"""Objects in subprocesses: what they are given, what comes back, and how their end is noticed.

Built-in objects do, for a subprocess cannot import what a test defines.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from twinfer.bench.subprocesses import Subprocess, SubprocessEnded, SubprocessFailed, run_in_subprocess
from twinfer.compiled.machine import checked_device
from twinfer.spec.errors import MachineError, RequestError

Started = list["subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def numbers() -> Iterator[Subprocess]:
    with Subprocess(list, [3, 1, 2]) as process:
        yield process


def test_an_object_lives_from_call_to_call(numbers: Subprocess) -> None:
    assert numbers.call("append", 0) is None
    assert numbers.call("pop") == 0
    assert numbers.call("copy") == [3, 1, 2]


def test_a_function_runs_with_its_environment() -> None:
    """And leaves this process's as it was."""
    environment = {"TWINFER_TEST": "7"}
    assert run_in_subprocess(os.getenv, "TWINFER_TEST", what="nothing", environment=environment) == "7"
    assert "TWINFER_TEST" not in os.environ


def test_what_is_printed_over_there_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    """Also what a library in another language prints: it goes to standard error."""
    assert run_in_subprocess(os.write, 1, b"a library talks\n", what="nothing") == 16
    assert capfd.readouterr() == ("", "a library talks\n")


def test_errors_of_this_project_come_back_as_they_are() -> None:
    with pytest.raises(RequestError, match="nonsense") as here:
        checked_device("nonsense")
    with pytest.raises(RequestError) as there:
        run_in_subprocess(checked_device, "nonsense", what="nothing")
    assert str(there.value) == str(here.value)


def test_other_errors_come_back_in_one_line_with_their_traceback(numbers: Subprocess) -> None:
    """And the next call is answered."""
    with pytest.raises(SubprocessFailed) as failed:
        numbers.call("pop", 9)
    assert str(failed.value) == "IndexError: pop index out of range"
    assert any("Traceback" in note and "IndexError" in note for note in failed.value.__notes__)
    assert numbers.call("__len__") == 3


def test_what_cannot_be_made_raises_and_leaves_no_process(started: Started) -> None:
    with pytest.raises(SubprocessFailed, match="ValueError"):
        Subprocess(int, "seven")
    (process,) = started
    assert process.returncode == 0


def test_a_process_that_is_killed_is_missed() -> None:
    text = r"^measuring int8: its process was killed by SIGKILL; is there enough memory\?$"
    with pytest.raises(MachineError, match=text):
        run_in_subprocess(signal.raise_signal, signal.SIGKILL, what="int8")


def test_a_process_that_leaves_is_missed_and_stays_missed() -> None:
    with Subprocess(list) as process:
        os.kill(process.pid, signal.SIGTERM)
        for _ in range(2):
            with pytest.raises(SubprocessEnded, match=r"^its process was killed by SIGTERM$"):
                process.call("__len__")


def test_closing_ends_the_process_by_itself(started: Started) -> None:
    """To close it once more changes nothing."""
    closed = Subprocess(list)
    (process,) = started
    assert process.poll() is None
    closed.close()
    assert process.returncode == 0
    closed.close()


def test_a_process_that_does_not_end_is_killed(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinfer.bench.subprocesses._CLOSING_S", 0.1)
    closed = Subprocess(list)
    os.kill(closed.pid, signal.SIGSTOP)
    began = time.perf_counter()
    closed.close()
    (process,) = started
    assert process.returncode == -signal.SIGKILL
    assert time.perf_counter() - began < 4
