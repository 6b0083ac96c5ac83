"""Starting the ranks of a job on this machine, and ending all of them when one ends early.

Each rank is this very command, started again with its number in the environment, as torchrun would do it. The process
that started them keeps the store where they meet, so that no port is chosen before it is taken, and computes nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from .member import SUPERVISED
from .watch import Doing, Failure, failure_of, sign_of

GRACE_S = 2.0
"""Seconds that the other ranks have to end by themselves, and say why, before they are killed."""

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ended:
    """How a job ended that did not do what it was asked for."""

    status: int
    message: str


class Job:
    """Ranks as processes. Use it as a context: at its end none is left, whatever happens."""

    def __init__(self, command: Sequence[str], ranks: int) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
        self._started = time.monotonic()
        threads = max(1, (os.cpu_count() or 1) // ranks)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "TORCH_CPP_LOG_LEVEL": "FATAL",  # lost connections are reported once, here
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            SUPERVISED: str(os.getpid()),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                output = None if rank == 0 else subprocess.DEVNULL
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=environment | own,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        start_new_session=True,  # control-C reaches this process, which ends them all
                    )
                )
        except BaseException:
            self.end()
            raise

    @property
    def port(self) -> int:
        """The port of this machine where the ranks meet."""
        return self._store.port

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        del self._store  # and with it the port

    def end(self) -> None:
        """Kill what is left of the ranks, and of what they have started; a rank that is halted ends too."""
        for process in self.processes:
            with suppress(ProcessLookupError):  # a rank that was killed may have left a compiler behind
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def wait(self) -> Ended | None:
        """Wait until all ranks have ended well, or one has not: then say which is to blame, and end the others."""
        while True:
            codes = [process.poll() for process in self.processes]
            if any(codes):
                return self._blame()
            if all(code == 0 for code in codes):
                return None
            time.sleep(_POLL_S)

    def _blame(self) -> Ended:
        noticed = time.monotonic()
        died = {rank: process.poll() for rank, process in enumerate(self.processes) if process.poll()}
        while None in [process.poll() for process in self.processes] and time.monotonic() < noticed + GRACE_S:
            time.sleep(_POLL_S)
        codes = {rank: process.poll() for rank, process in enumerate(self.processes)}
        failures = {rank: failure for rank, code in codes.items() if code and (failure := self._failure(rank))}
        killed = {rank: code for rank, code in codes.items() if code and code < 0 and rank not in failures}
        self.end()
        ended = f"the job of {len(codes)} ranks ended {time.monotonic() - noticed:.1f} s after it was noticed"
        first = [rank for rank in killed if rank in died]
        errors, silences, losses = ([rank for rank, each in failures.items() if each[0] == kind] for kind in Failure)
        later = [rank for rank in killed if rank not in died]  # by a signal of its own, as torch ends after a loss
        rank = [*first, *errors, *silences, *later, *losses, *died][0]
        if rank in killed:
            name = signal.Signals(-killed[rank]).name
            return Ended(1, f"rank {rank} was killed by {name}; it was last seen {self._doing(rank)}; {ended}")
        if rank not in failures:
            status = codes[rank]
            return Ended(1, f"rank {rank} ended with status {status}; it was last seen {self._doing(rank)}; {ended}")
        kind, blamed, why, refused = failures[rank]
        if kind == Failure.ERROR and refused:
            return Ended(2, why if rank == 0 else f"rank {rank}: {why}")
        return Ended(1, f"rank {blamed} {why}; {ended}")

    def _failure(self, rank: int) -> tuple[str, int, str, bool] | None:
        if not self._store.check([failure_of(rank)]):
            return None
        kind, blamed, why, refused = json.loads(self._store.get(failure_of(rank)))
        return kind, blamed, why, refused

    def _doing(self, rank: int) -> str:
        if not self._store.check([sign_of(rank)]):
            return Doing.JOINING.value
        doing: str = json.loads(self._store.get(sign_of(rank)))[2]
        return doing


def launch(arguments: Sequence[str], ranks: int) -> Ended | None:
    """Run `twinfer` with these arguments on so many ranks of this machine; returns None if all went well."""
    assert dist.is_available()
    with Job([sys.executable, "-m", "twinfer", *arguments], ranks) as job:
        return job.wait()
