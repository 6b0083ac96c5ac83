"""Finding out that a rank of a job has stopped: each tells the others twice a second how far it has come.

    dead        its connections close, and whoever waits for it gets an error at once
    stopped     its signs of life stop: it was halted, or something holds its interpreter
    stuck       it lives and says that it computes, but does not get any further

A rank that waits for others, reads weights, compiles or has nothing to do may take any time. A rank that finds another
one silent writes down why, and ends its own process; the others follow, as their connections close. And a rank whose
starter is gone ends too, with what it has started: nobody else would end it.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn

from torch._C._distributed_c10d import Store

SILENCE_S = 8.0
"""Seconds without a sign of life, or without progress in a layer, after which a rank counts as lost."""

_INTERVAL_S = 0.5


class Doing(StrEnum):
    """What a rank does."""

    JOINING = "joining the job"
    READING = "reading weights"
    COMPILING = "compiling"
    IDLE = "waiting for a request"
    COMPUTING = "computing"
    WAITING = "waiting for other ranks"


class Failure(StrEnum):
    """Why a rank ends its process early."""

    ERROR = "error"
    """Something it was asked for is impossible, or it has a bug."""
    SILENCE = "silence"
    """Another rank was found silent."""
    LOST = "lost"
    """A connection to another rank closed."""


class Progress:
    """How far this rank has come."""

    def __init__(self) -> None:
        self.doing = Doing.JOINING
        self.steps = 0
        self.tell: Callable[[], None] = lambda: None
        """Tells the others at once; else they hear of it at the next beat."""

    def enter(self, doing: Doing) -> None:
        """Begin a part of the work that takes long."""
        self.doing = doing
        self.tell()

    def step(self) -> None:
        """Note that a layer, or a part of the weights, is done."""
        self.steps += 1

    def wait(self, waiting: bool) -> None:
        """Note that a wait for other ranks begins or ends."""
        self.steps += 1
        if self.doing in (Doing.COMPUTING, Doing.WAITING):
            self.doing = Doing.WAITING if waiting else Doing.COMPUTING


@dataclass(slots=True)
class _Seen:
    """What was last heard of a rank, and since when it has been the same."""

    beat: Any = None
    steps: Any = None
    beat_s: float = 0.0
    steps_s: float = 0.0


class Watch:
    """A thread that tells how far this rank is, and looks at the others.

    `on_silence` gets a rank and what is wrong; `on_loss` is called once the store is gone.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        progress: Progress,
        on_silence: Callable[[int, str], None],
        on_loss: Callable[[], None],
    ) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._progress, self._on_silence, self._on_loss = progress, on_silence, on_loss
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Tell the others how far this rank is."""
        self._beat += 1
        told = [self._beat, self._progress.steps, self._progress.doing.value]
        self._store.set(sign_of(self._rank), json.dumps(told))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = {other: _Seen(beat_s=time.monotonic(), steps_s=time.monotonic()) for other in range(self._ranks)}
        looked = time.monotonic()
        while not self._ended.wait(_INTERVAL_S):
            try:
                self.tell()
                before, looked = looked, time.monotonic()
                if looked - before > SILENCE_S / 2:  # this rank or the store was halted, and others may have been
                    seen = {other: _Seen(beat_s=looked, steps_s=looked) for other in seen}
                self._look_at_others(seen)
            except Exception:  # the store is gone: whoever kept it has ended
                if not self._ended.is_set():
                    self._on_loss()

    def _look_at_others(self, seen: dict[int, _Seen]) -> None:
        now = time.monotonic()
        for other, last in seen.items():
            if other == self._rank:
                continue
            beat, steps, doing = self._told_by(other)
            if beat != last.beat:
                last.beat, last.beat_s = beat, now
            if steps != last.steps or doing != Doing.COMPUTING:
                last.steps, last.steps_s = steps, now
            if now - last.beat_s > SILENCE_S:
                self._on_silence(other, f"gave no sign of life for {SILENCE_S:g} s; it was last seen {doing}")
            elif now - last.steps_s > SILENCE_S:
                self._on_silence(other, f"hangs: it was {doing}, and got no further for {SILENCE_S:g} s")

    def _told_by(self, other: int) -> list[Any]:
        """Return the last sign of a rank; before the first it is joining, and may be halted there as anywhere."""
        if not self._store.check([sign_of(other)]):
            return [None, None, Doing.JOINING.value]
        told: list[Any] = json.loads(self._store.get(sign_of(other)))
        return told


@contextmanager
def ending_with(starter: int) -> Iterator[None]:
    """End this process, and what it has started, soon after its parent is no longer the process `starter`."""
    ended = threading.Event()

    def look() -> None:
        while True:
            if os.getppid() != starter:
                end_with_children()
            if ended.wait(_INTERVAL_S):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def end_with_children() -> NoReturn:
    """End this process at once, and a compiler that it may have started, where it leads a process group of its own."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def sign_of(rank: int) -> str:
    """Return the key under which a rank tells how far it is: beats, steps and what it does."""
    return f"sign/{rank}"


def failure_of(rank: int) -> str:
    """Return the key under which a rank says why it ended: the kind, the rank that is to blame, and a message."""
    return f"failure/{rank}"
