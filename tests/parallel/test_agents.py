"""Ranks that two agents of torchrun start, as on two hosts: they answer, and end when a rank or an agent is killed.

HYPOTHESIS_PROFILE=exhaustive python -m pytest -n0 -s tests/parallel/test_agents.py
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .processes import children, command_of, eventually, lives, with_setting
from .test_kills import COMMAND, MOST_S, TENSOR, named

pytestmark = pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes minutes")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def agents(words: list[str], folder: Path) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path], int]]:
    """Two agents, the files that they print to, and their port; they print there what goes to standard error too."""
    port = free_port()
    each = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    each += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    outputs, both = [folder / "0", folder / "1"], []
    for node, output in enumerate(outputs):
        with output.open("wb") as written, output.with_suffix(".errors").open("wb") as errors:
            both.append(subprocess.Popen([*each, "--node-rank", str(node), *words], stdout=written, stderr=errors))
    try:
        yield both, outputs, port
    finally:
        for process in both:
            process.kill()
            process.wait()
        for pid in with_setting("MASTER_PORT", port):
            os.kill(pid, signal.SIGKILL)


def test_two_agents(tmp_path: Path) -> None:
    """They print once what one process prints."""
    words = ["-m", "twinfer", "generate", "tiny-moe", "--prompt-ids", "1,2,3", "--max-new-tokens", "12"]
    one = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300)
    with agents([*words, *TENSOR], tmp_path) as (both, outputs, _):
        assert [process.wait(300) for process in both] == [0, 0]
    assert [output.read_text() for output in outputs] == [one.stdout, ""]
    assert one.stdout.strip()


@pytest.mark.parametrize(
    ("whom", "node", "number"),
    [
        *[(whom, node, signal.SIGKILL) for whom in ("rank", "agent") for node in (0, 1)],
        ("agent", 0, signal.SIGINT),
        ("agent", 1, signal.SIGTERM),
    ],
    ids=named,
)
@pytest.mark.parametrize("phase", ["load", "decode"])
def test_a_signal_ends_two_agents(whom: str, node: int, number: signal.Signals, phase: str, tmp_path: Path) -> None:
    """Both end, with a status that is not 0, and so do their ranks."""
    with agents([*COMMAND, *TENSOR], tmp_path) as (both, outputs, port):

        def ranks() -> list[int]:
            return [pid for process in both for pid in children(process.pid) if "twinfer" in command_of(pid)]

        assert eventually(lambda: len(ranks()) == 2, 120)
        pids = ranks()
        if phase == "load":
            time.sleep(4)
        else:
            assert eventually(lambda: outputs[0].stat().st_size > 0, 120)
        assert all(map(lives, pids)), "the job ended before the signal"
        os.kill(pids[node] if whom == "rank" else both[node].pid, number)
        begin = time.monotonic()
        statuses = [process.wait(60) for process in both]
        assert eventually(lambda: not with_setting("MASTER_PORT", port), MOST_S)
        seconds = time.monotonic() - begin
        said = [output.with_suffix(".errors").read_text() for output in outputs]
        lines = [line for text in said for line in text.splitlines() if line.startswith("twinfer: error")]
        print(f"\n| {number.name} to {whom} {node} | {phase} | {seconds:.2f} | {statuses} {' / '.join(lines)} |")
        assert all(statuses)
        assert seconds < MOST_S
