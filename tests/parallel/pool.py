"""Real ranks for tests: processes that are started once for a module and run many cases."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist

PATIENCE_S = 60.0
"""Longer than any case that does not compile; after it the pool is taken to hang."""


class Pool:
    """Ranks that wait for cases; each runs the function of that name in `cases`, and returns what it returns.

    After a rank raised or hung, the next case has ranks of its own: the old ones may wait for each other forever, and
    what they still say is no answer to it.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: dict[int, Connection] = {}

    def run(self, name: str, *, patience_s: float = PATIENCE_S, **arguments: Any) -> list[Any]:
        """Return the results of all ranks, in their order."""
        if not self._connections:
            self._start()
        try:
            return self._answers(name, arguments, patience_s)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes, self._connections = [], {}

    def _answers(self, name: str, arguments: dict[str, Any], patience_s: float) -> list[Any]:
        for connection in self._connections.values():
            connection.send_bytes(pickle.dumps((name, arguments)))
        results: dict[int, Any] = {}
        end = time.monotonic() + patience_s
        while len(results) < self.ranks:
            missing = {self._connections[rank]: rank for rank in self._connections if rank not in results}
            ready = wait(list(missing), max(0.0, end - time.monotonic()))
            assert ready, f"ranks {sorted(missing.values())} hang in {name}"
            for connection in ready:
                assert isinstance(connection, Connection)
                fine, result = pickle.loads(connection.recv_bytes())
                assert fine, result
                results[missing[connection]] = result
        return [results[rank] for rank in sorted(results)]

    def _start(self) -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        worker = Path(__file__).with_name("worker.py")
        with Listener(("127.0.0.1", 0), authkey=b"ranks") as listener:
            told = [str(self.ranks), str(store.port), str(listener.address[1])]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._processes = [
                subprocess.Popen([sys.executable, str(worker), str(rank), *told], env=environment)
                for rank in range(self.ranks)
            ]
            for _ in self._processes:
                connection: Any = listener.accept()
                self._connections[connection.recv()] = connection
        self._store = store


@contextmanager
def started(ranks: int) -> Iterator[Pool]:
    pool = Pool(ranks)
    try:
        yield pool
    finally:
        pool.end()
