"""kill -9 of a rank while a store is run in batches: the job ends, and the same command goes on.

HYPOTHESIS_PROFILE=exhaustive python -m pytest -n0 -s tests/offload/test_rank_kills.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twinfer.parallel.launch import Job

from ..parallel.processes import eventually
from .test_kills import lines_of

pytestmark = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "exhaustive", reason="takes minutes, and compiles"
)

MOMENTS = 10
PROMPTS = 6
TWINFER = [sys.executable, "-m", "twinfer"]


def twinfer(*words: str) -> str:
    return subprocess.run([*TWINFER, *words], check=True, capture_output=True, text=True, timeout=600).stdout


def test_a_rank_killed_while_a_store_is_run_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Results that were written stay, the rest is run, and all are those of a run that was not killed."""
    store, prompts = str(tmp_path / "s"), tmp_path / "prompts"
    twinfer("offload", "build", "tiny-moe", store, "--tensor", "2")
    prompts.write_text("".join(f"And it came to pass in verse {index}\n" for index in range(PROMPTS)))

    def words(out: Path) -> list[str]:
        how = ["--tensor", "2", "--memory-budget", "64MB", "--max-new-tokens", "60"]
        return ["generate", store, *how, "--prompts-file", str(prompts), "--output", str(out), "--batch", "2"]

    assert f"{PROMPTS} of them new" in twinfer(*words(tmp_path / "whole"))
    expected, pick = lines_of(tmp_path / "whole"), random.Random(5)
    begin_s = time.monotonic()
    with Job([*TWINFER, *words(tmp_path / "again")], 2) as job:
        assert eventually(lambda: (tmp_path / "again").exists(), 300)
        begin_s = time.monotonic()
        assert job.wait() is None
    whole_s = time.monotonic() - begin_s
    assert lines_of(tmp_path / "again") == expected
    for moment in range(MOMENTS):
        out, after_s = tmp_path / f"out{moment}", pick.uniform(0, whole_s)
        with Job([*TWINFER, *words(out)], 2) as job:
            assert eventually(out.exists, 300)
            time.sleep(after_s)
            os.kill(job.processes[moment % 2].pid, signal.SIGKILL)
            ended = job.wait()
        there = lines_of(out)
        print(f"\n| rank {moment % 2} | {after_s:.2f} of {whole_s:.2f} s | {len(there)} results | {ended} |")
        assert ended is None or "was killed by SIGKILL" in ended.message
        assert all(expected[number] == result for number, result in there.items())
        assert f"{PROMPTS - len(there)} of them new" in twinfer(*words(out))
        assert lines_of(out) == expected
