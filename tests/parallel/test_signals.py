"""Control-C, and the death of the process that started the ranks, end every rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twinfer.parallel.launch import Job

from .processes import lives

RUN = """
import sys
from twinfer.parallel.launch import Job
with Job([sys.executable, *sys.argv[1:]], 2) as job:
    print(*[process.pid for process in job.processes], flush=True)
    job.wait()
"""
WAITS = "import time; time.sleep(600)"
FAULTY = Path(__file__).with_name("faulty.py")


def started(*rank: str) -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen([sys.executable, "-c", RUN, *rank], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def test_control_c_ends_all_ranks() -> None:
    process, pids = started("-c", WAITS)
    process.send_signal(signal.SIGINT)
    assert process.wait(15) != 0
    assert len(pids) == 2
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_the_rank_that_died_first_is_named() -> None:
    """Not one of a lower number that is aborted half a second later, as torch may do after a loss."""
    dies = "rank = int(os.environ['RANK']); time.sleep(0.5 - 0.5 * rank); os.kill(os.getpid(), (6, 9)[rank])"
    with Job([sys.executable, "-c", f"import os, time; {dies}"], 2) as job:
        ended = job.wait()
    assert ended is not None
    assert ended.message.startswith("rank 1 was killed by SIGKILL"), ended.message


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes half a minute")
def test_ranks_do_not_outlive_who_started_them() -> None:
    """They look every half second whether it is there."""
    process, pids = started(str(FAULTY), "decode", "1", "loop", "2", "1")
    time.sleep(20)
    process.kill()
    process.wait()
    end = time.monotonic() + 15
    while time.monotonic() < end and any(map(lives, pids)):
        time.sleep(0.2)
    assert not [pid for pid in pids if lives(pid)]
