"""kill -9 of any rank of a real job, at drawn moments: the job ends soon, names the rank, and leaves nothing behind.

    HYPOTHESIS_PROFILE=exhaustive python -m pytest -n0 -s tests/parallel/test_kills.py

prints what was killed, when, seconds to the end of the job, and the message.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twinfer.parallel.launch import Ended, Job
from twinfer.parallel.watch import sign_of

from .processes import children, command_of, eventually, lives

pytestmark = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes minutes, and compiles"
)

MOST_S = 15.0
"""From the kill to the end of the job."""
PROMPT = ",".join(str(token % 200) for token in range(200))
COMMAND = ["-m", "twinfer", "generate", "tiny-moe", "--tensor", "2", "--prompt-ids", PROMPT, "--max-new-tokens", "311"]
"""As many tokens as the model takes."""

PHASES = {
    "join": ("joining the job", 0.0),
    "load": ("reading weights", 0.5),
    "compile": ("compiling", 4.0),
    "prefill": ("", 0.2),
    "decode": ("", 1.0),
}
"""What the rank says that it does when the phase begins, and within how many seconds from then it is killed."""


def killed(phase: str, rank: int, delay_s: float, output: Path) -> tuple[Ended | None, float, list[int], int]:
    """How the job ended, seconds from the kill to its end, its processes, and its port."""
    before = os.dup(1)
    with output.open("wb") as written:
        os.dup2(written.fileno(), 1)
    try:
        job = Job([sys.executable, *COMMAND], 2)
    finally:
        os.dup2(before, 1)
        os.close(before)
    with job:
        port, pids = job.port, [process.pid for process in job.processes]

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
        time.sleep(delay_s)
        assert all(map(lives, pids)), "the job ended before the kill"
        os.kill(pids[rank], signal.SIGKILL)
        begin = time.monotonic()
        ended = job.wait()
        seconds = time.monotonic() - begin
    return ended, seconds, pids, port


@pytest.mark.parametrize(("phase", "rank", "turn"), [(p, r, t) for t in range(3) for p in PHASES for r in (0, 1)])
def test_a_kill_ends_the_job(phase: str, rank: int, turn: int, tmp_path: Path) -> None:
    most_s = 3.0 if phase == "join" else PHASES[phase][1]
    delay_s = random.Random(f"{phase} {rank} {turn}").uniform(0, most_s)
    ended, seconds, pids, port = killed(phase, rank, delay_s, tmp_path / "output")
    assert ended is not None
    print(f"\n| {phase} | {rank} | {delay_s:.2f} | {seconds:.2f} | {ended.message} |")
    assert ended.status == 1
    assert ended.message.startswith(f"rank {rank} was killed by SIGKILL; it was last seen"), ended.message
    assert seconds < MOST_S
    assert not any(map(lives, pids))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.parametrize("delay_s", [1.0, 6.0, 14.0])
def test_control_c_ends_the_command(delay_s: float) -> None:
    """Whatever the ranks are doing; silently, with status 130."""
    process = subprocess.Popen([sys.executable, *COMMAND], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: len(children(process.pid)) == 2, 120)
    pids = children(process.pid)
    time.sleep(delay_s)
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(MOST_S) == 130
    print(f"\n| control-C | | {delay_s:.2f} | {time.monotonic() - begin:.2f} | |")
    assert "Traceback" not in process.communicate()[1]
    assert not any(map(lives, pids))


def agents(port: int, words: list[str]) -> list[subprocess.Popen[str]]:
    """Two of torchrun's, as on two hosts."""
    each = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    each += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [
        subprocess.Popen(
            [*each, "--node-rank", str(node), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for node in range(2)
    ]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def test_two_agents() -> None:
    """They print once what one process prints."""
    words = ["-m", "twinfer", "generate", "tiny-moe", "--prompt-ids", "1,2,3", "--max-new-tokens", "12"]
    one = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    both = agents(free_port(), [*words, "--tensor", "2"])
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [output for output, _ in said] == [one.stdout, ""]
    assert one.stdout.strip()


@pytest.mark.parametrize("node", [0, 1])
def test_a_kill_of_a_rank_ends_two_agents(node: int) -> None:
    both = agents(free_port(), COMMAND)

    def ranks() -> list[int]:
        return [pid for process in both for pid in children(process.pid) if "twinfer" in command_of(pid)]

    assert eventually(lambda: len(ranks()) == 2, 120)
    pids = ranks()
    time.sleep(12)
    assert all(map(lives, pids))
    os.kill(pids[node], signal.SIGKILL)
    begin = time.monotonic()
    statuses = [process.wait(60) for process in both]
    seconds = time.monotonic() - begin
    said = [process.communicate()[1] for process in both]
    lines = [line for text in said for line in text.splitlines() if line.startswith("twinfer: error")]
    print(f"\n| agents | {node} | 12.00 | {seconds:.2f} | {' / '.join(lines)} |")
    assert all(statuses)
    assert seconds < MOST_S
    assert not any(map(lives, pids))
