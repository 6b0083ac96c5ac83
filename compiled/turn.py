"""One call of a path at a time, under pinned settings of torch; and what a fork leaves of a path.

Compiled steps write into memory that is the path's own (a graph's step and logits), and CPU graphs are recorded by
putting other functions into Inductor's modules, which are the process's. So calls of one path wait for each other, as
do recordings and compilations of all paths. Two paths may run at once.

A forked child has one thread: those of OpenMP are gone, and a kernel that was compiled for several waits for them
forever. There a path is loaded for one thread; one that was compiled for several before the fork is refused.
"""

import os
import threading
import weakref

import torch

from ..spec.ambient import pinned
from ..spec.errors import MachineError

_forks = 0
"""How many forks lie between this process and the first one that imported this."""


class Lock:
    """A re-entrant lock that no thread of another process can hold: a forked child has it free."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
        self._lock.release()

    def renew(self) -> None:
        """Free it, in a forked child, unless the thread that forked holds it."""
        if self._owner != threading.get_ident():
            self._lock, self._owner, self._depth = threading.RLock(), None, 0


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()

PROCESS = Lock()
"""Held while kernels are compiled or recorded: both change modules that all paths share."""


class Turn:
    """`with turn:` around each call of a path. Raises `MachineError` where a fork has left it without its threads."""

    def __init__(self, device: torch.device, *, compiled: bool) -> None:
        self._device = device
        self._compiled = compiled
        self._forks = _forks
        self._threads = torch.get_num_threads() if _forks == 0 else 1
        self._lock = Lock()
        self._settings: list[pinned] = []

    def __enter__(self) -> None:
        threads = self._threads if self._forks == _forks else self._threads_after_fork()
        settings = pinned(self._device, threads)
        self._lock.__enter__()
        try:
            settings.__enter__()
        except BaseException:
            self._lock.__exit__()
            raise
        self._settings.append(settings)

    def __exit__(self, *_: object) -> None:
        try:
            self._settings.pop().__exit__()
        finally:
            self._lock.__exit__()

    def _threads_after_fork(self) -> int:
        if self._device.type != "cpu":
            raise MachineError(
                f"this process was forked after the model was loaded on {self._device}, which a forked process cannot "
                "use; load the model in it, and start it by spawn, not fork"
            )
        if self._compiled and self._threads > 1:
            raise MachineError(
                f"this process was forked after the model was compiled for {self._threads} threads, which a fork does "
                "not copy; load the model in the forked process, start that by spawn, or call torch.set_num_threads(1) "
                "before loading"
            )
        return 1


def _after_fork() -> None:
    global _forks
    _forks += 1
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
