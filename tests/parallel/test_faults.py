"""However a rank ends early, the job ends soon, says which rank it was and what happened, and leaves nothing behind."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from twinfer.parallel.launch import Ended, Job

FAULTY = Path(__file__).with_name("faulty.py")
MOST_S = 15.0
"""From the fault to the end of the job."""

SAYS = {
    "kill": "rank {} was killed by SIGKILL; it was last seen {}",
    "halt": "rank {} gave no sign of life for 8 s; it was last seen {}",
    "loop": "rank {} hangs: it was computing, and got no further for 8 s",
    "raise": "rank {} raised ArithmeticError",
}
DOING = {
    "read": "reading weights",
    "compile": "compiling",
    "prefill": "",  # what it says every half second, which may be old by a step
    "decode": "",
    "sum": "",
}


def run(phase: str, rank: int, kind: str, tensor: int = 2, pipeline: int = 1) -> tuple[Ended | None, float, list[int]]:
    """Return how the job ended, seconds from the fault to its end, and the processes that it had."""
    told = [str(each) for each in (FAULTY, phase, rank, kind, tensor, pipeline)]
    reads, writes = os.pipe()
    before = os.dup(2)
    os.dup2(writes, 2)  # ranks inherit it, and say there when the fault comes
    try:
        with Job([sys.executable, *told], tensor * pipeline) as job:
            os.dup2(before, 2)
            port = job.port
            if kind != "none":
                os.read(reads, 1)
            begin = time.monotonic()
            ended = job.wait()
            pids = [process.pid for process in job.processes]
        seconds = time.monotonic() - begin
    finally:
        os.dup2(before, 2)
        for each in (reads, writes, before):
            os.close(each)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)
    return ended, seconds, pids


def test_without_a_fault_the_job_ends_well() -> None:
    ended, _, _ = run("prefill", 0, "none")
    assert ended is None


EXHAUSTIVE = os.environ.get("HYPOTHESIS_PROFILE") == "exhaustive"
EVERY = [(phase, rank, kind) for phase in DOING for rank in (0, 1) for kind in SAYS]
FAULTS = [each for each in EVERY if each[0] in ("prefill", "decode", "sum") or each[2] != "loop"]
"""Who reads weights or compiles may take any time, so there a loop is no sign."""


@pytest.mark.parametrize(
    ("phase", "rank", "kind"),
    FAULTS if EXHAUSTIVE else [("read", 1, "kill"), ("decode", 1, "halt"), ("compile", 1, "raise"), ("sum", 0, "kill")],
)
def test_a_fault_ends_the_job(phase: str, rank: int, kind: str) -> None:
    ended, seconds, pids = run(phase, rank, kind)
    assert ended is not None
    assert ended.status == 1
    assert ended.message.startswith(SAYS[kind].format(rank, DOING[phase])), ended.message
    assert seconds < MOST_S, f"{seconds} s"
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
