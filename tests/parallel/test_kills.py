"""Real jobs of which a rank, or who started the ranks, is killed, halted or told to end, at drawn moments.

    HYPOTHESIS_PROFILE=exhaustive python -m pytest -n0 -s tests/parallel/test_kills.py

prints what was done to whom and when, seconds to the end of the job, and the message. It takes a quarter of an hour.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from twinfer.parallel.launch import Ended, Job
from twinfer.parallel.member import SUPERVISED
from twinfer.parallel.watch import sign_of

from .processes import eventually, lives, with_setting

pytestmark = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes minutes, and compiles"
)

MOST_S = 15.0
"""From what is done to the end of the job."""
PROMPT = ",".join(str(token % 200) for token in range(200))
COMMAND = ["-m", "twinfer", "generate", "tiny-moe", "--prompt-ids", PROMPT, "--max-new-tokens", "311"]
"""As many tokens as the model takes."""
TENSOR, PIPELINE = ("--tensor", "2"), ("--pipeline", "2")
EXPERT, FOUR = (*TENSOR, "--expert", "2"), (*TENSOR, *PIPELINE)

PHASES = {
    "join": ("joining the job", 3.0),
    "load": ("reading weights", 0.3),
    "compile": ("compiling", 3.0),
    "prefill": ("", 0.1),
    "decode": ("", 0.5),
}
"""What the rank says that it does when the phase begins, and within how many seconds from then it is stopped."""

OF_TWO = [(degrees, phase, rank) for degrees in (TENSOR, PIPELINE, EXPERT) for phase in PHASES for rank in (0, 1)]
OF_FOUR = [(FOUR, phase, (place + turn) % 4) for turn in (0, 2) for place, phase in enumerate(PHASES)]
KILLS = [(*each, signal.SIGKILL) for each in OF_TWO + OF_FOUR]
HALTS = [(TENSOR, "load", 1, signal.SIGSTOP), (PIPELINE, "compile", 0, signal.SIGSTOP)]
HALTS += [(EXPERT, "decode", rank, signal.SIGSTOP) for rank in (0, 1)] + [(FOUR, "decode", 2, signal.SIGSTOP)]
REQUESTS = [(TENSOR, "decode", 0, signal.SIGTERM), (PIPELINE, "compile", 1, signal.SIGTERM)]
REQUESTS += [(EXPERT, "decode", 1, signal.SIGINT)]


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send there what processes print that are started within this."""
    before = os.dup(1)
    with path.open("wb") as written:
        os.dup2(written.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def wait_for(job: Job, phase: str, rank: int, output: Path) -> None:
    """Return once the phase has begun on this rank."""

    def doing() -> str:
        said: list[str] = [""]
        if job._store.check([sign_of(rank)]):
            said = json.loads(job._store.get(sign_of(rank)))
        return said[-1]

    begun = {
        "join": lambda: True,
        "prefill": lambda: doing() in ("computing", "waiting for other ranks", "waiting for a request"),
        "decode": lambda: output.stat().st_size > 0,
    }.get(phase, lambda: doing() == PHASES[phase][0])
    assert eventually(begun, 300), f"{phase} does not begin"


def ended_by(
    degrees: tuple[str, ...], phase: str, rank: int, number: int, delay_s: float, folder: Path
) -> tuple[Ended | None, float]:
    """Return how the job ended after a signal to a rank, and how many seconds later; nothing of it is left."""
    output, memory = folder / "output", set(os.listdir("/dev/shm"))
    ranks = 4 if degrees == FOUR else 2
    with output_to(output):
        job = Job([sys.executable, *COMMAND, *degrees], ranks)
    with job:
        port, pids = job.port, [process.pid for process in job.processes]
        wait_for(job, phase, rank, output)
        time.sleep(delay_s)
        assert all(map(lives, pids)), "the job ended before the signal"
        os.kill(pids[rank], number)
        begin = time.monotonic()
        ended = job.wait()
        seconds = time.monotonic() - begin
    assert not with_setting("MASTER_PORT", port), "processes are left"
    assert set(os.listdir("/dev/shm")) <= memory, "memory is left"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)
    return ended, seconds


@pytest.mark.parametrize("degrees", [TENSOR, PIPELINE, EXPERT, FOUR], ids=" ".join)
def test_a_whole_run(degrees: tuple[str, ...]) -> None:
    """Of each of these jobs, so that kept programs are there for the others; it prints what one process prints."""
    said = [
        subprocess.run([sys.executable, *COMMAND, *each], capture_output=True, text=True, timeout=500)
        for each in ((), degrees)
    ]
    assert said[1].returncode == 0, said[1].stderr
    assert said[1].stdout == said[0].stdout


def named(each: object) -> str | None:
    """Name degrees and signals in the test's id."""
    if isinstance(each, signal.Signals):
        return each.name
    return " ".join(each) if isinstance(each, tuple) else None


@pytest.mark.parametrize(("degrees", "phase", "rank", "number"), KILLS + HALTS + REQUESTS, ids=named)
def test_a_signal_to_a_rank_ends_the_job(
    degrees: tuple[str, ...], phase: str, rank: int, number: signal.Signals, tmp_path: Path
) -> None:
    delay_s = random.Random(f"{degrees} {phase} {rank} {number}").uniform(0, PHASES[phase][1])
    ended, seconds = ended_by(degrees, phase, rank, number, delay_s, tmp_path)
    assert ended is not None
    print(f"\n| {' '.join(degrees)} | {number.name} {rank} | {phase} + {delay_s:.2f} | {seconds:.2f} | {ended.message}")
    assert ended.status == 1
    halted = number == signal.SIGSTOP
    says = "gave no sign of life for 8 s; it" if halted else f"was killed by {number.name}; it"
    asked_early = number != signal.SIGKILL and phase == "join"  # then python ends by itself
    assert asked_early or ended.message.startswith(f"rank {rank} {says} was last seen"), ended.message
    assert seconds < MOST_S


def started(*degrees: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Return a command and its ranks."""
    process = subprocess.Popen(
        [sys.executable, *COMMAND, *degrees], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    ranks = 4 if degrees == FOUR else 2
    assert eventually(lambda: len(with_setting(SUPERVISED, process.pid)) >= ranks, 120)
    return process, with_setting(SUPERVISED, process.pid)


STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: -signal.SIGHUP, signal.SIGKILL: -signal.SIGKILL}
TO_THE_COMMAND = [(number, delay_s) for number in STATUS for delay_s in (0.1, 2.0, 4.0, 8.0)]


@pytest.mark.parametrize(("number", "delay_s"), TO_THE_COMMAND, ids=named)
def test_a_signal_to_the_command_ends_all_ranks(number: signal.Signals, delay_s: float) -> None:
    """Whatever the ranks are doing, and silently; who started the ranks may end without ending them."""
    process, pids = started(*TENSOR)
    time.sleep(delay_s)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(number)
    assert process.wait(MOST_S) == STATUS[number]
    assert eventually(lambda: not with_setting(SUPERVISED, process.pid), MOST_S), "ranks are left"
    print(f"\n| the command | {number.name} | {delay_s:.2f} after its ranks | {time.monotonic() - begin:.2f} |")
    assert not process.communicate()[1]
    assert not any(map(lives, pids))


@pytest.mark.parametrize("delay_s", [3.0, 6.0])
def test_a_command_that_is_suspended_goes_on(delay_s: float) -> None:
    """As control-Z and fg do it, for longer than ranks may be silent."""
    process, _ = started(*TENSOR)
    time.sleep(delay_s)
    process.send_signal(signal.SIGSTOP)
    time.sleep(12)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0, process.communicate()[1]


def test_a_store_that_vanishes_ends_the_job(tmp_path: Path) -> None:
    """Its files are emptied while ranks read them again for each token, as if the disk were gone; one is named."""
    store, output = tmp_path / "store", tmp_path / "output"
    build = [sys.executable, "-m", "twinfer", "offload", "build", "tiny-moe", str(store)]
    subprocess.run(build, check=True, capture_output=True)
    streamed = [str(store) if word == "tiny-moe" else word for word in COMMAND]
    with output_to(output):
        job = Job([sys.executable, *streamed, *PIPELINE, "--memory-budget", "64MB"], 2)
    with job:
        wait_for(job, "decode", 0, output)
        for file in store.rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
        begin = time.monotonic()
        ended = job.wait()
        seconds = time.monotonic() - begin
    assert ended is not None
    print(f"\n| store vanishes | decode | {seconds:.2f} | {ended.message}")
    assert ended.status == 2
    assert str(store) in ended.message
    assert "ends early" in ended.message
    assert seconds < MOST_S
