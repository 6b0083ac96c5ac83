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

PATIENCE_S = 300
"""Longer than any case, one that compiles included; after it the pool is taken to hang."""


class Pool:
    """Ranks that wait for cases; each runs the function of that name in `cases`, and returns what it returns."""

    def __init__(self, connections: dict[int, Connection]) -> None:
        self._connections = connections

    def run(self, name: str, **arguments: Any) -> list[Any]:
        """Return the results of all ranks, in their order."""
        for connection in self._connections.values():
            connection.send_bytes(pickle.dumps((name, arguments)))
        results: dict[int, Any] = {}
        end = time.monotonic() + PATIENCE_S
        while len(results) < len(self._connections):
            missing = {self._connections[rank]: rank for rank in self._connections if rank not in results}
            ready = wait(list(missing), max(0.0, end - time.monotonic()))
            assert ready, f"ranks {sorted(missing.values())} hang in {name}"
            for connection in ready:
                assert isinstance(connection, Connection)
                fine, result = pickle.loads(connection.recv_bytes())
                assert fine, result  # the others may wait for this rank forever
                results[missing[connection]] = result
        return [results[rank] for rank in sorted(results)]


@contextmanager
def started(ranks: int) -> Iterator[Pool]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    worker = Path(__file__).with_name("worker.py")
    with Listener(("127.0.0.1", 0), authkey=b"ranks") as listener:
        told = [str(ranks), str(store.port), str(listener.address[1])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([sys.executable, str(worker), str(rank), *told], env=environment) for rank in range(ranks)
        ]
        try:
            connections = {}
            for _ in processes:
                connection: Any = listener.accept()
                connections[connection.recv()] = connection
            yield Pool(connections)
        finally:
            for process in processes:
                process.kill()
                process.wait()
