"""Joining a job: this process becomes one of its ranks, once all have found that they are about the same thing.

Who started the processes (`launch`, or torchrun on one host or several) has put RANK, WORLD_SIZE and where to meet into
the environment. Before any weight is read, ranks compare the versions of twinfer and torch, the request, and a digest
of the model's config and tensors.
"""

import json
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from ..spec.errors import MachineError, RequestError, TwinferError, one_line
from ..spec.parallel import ParallelConfig
from .groups import PATIENCE, Groups, form_groups
from .watch import Doing, Failure, Progress, Watch, end_with_children, ending_with, failure_of
from .wire import Wire

SUPERVISED = "TWINFER_SUPERVISED"
"""The number of the process that started the ranks, where `launch` did: it reports why a job ended, so they do not."""

_MEETING = timedelta(seconds=120)

_LOST = ("onnection", "gloo", "NCCL")
"""What is in the message of a collective whose other ranks are gone."""


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """This process as a rank of a job."""

    rank: int
    local_rank: int
    """Its number on this host."""
    groups: Groups
    wire: Wire
    store: Store
    progress: Progress

    @property
    def leads(self) -> bool:
        """Whether it is the rank that takes requests and chooses tokens."""
        return self.rank == 0


@contextmanager
def joined(parallel: ParallelConfig, facts: Mapping[str, str], device_type: str = "cpu") -> Iterator[Member]:
    """Join the job that the environment names; `facts` must be equal on all ranks, their keys say what they are.

    Raises `RequestError` where the job has another number of ranks than the config, or facts differ. An error that
    ends this rank is written down for whoever started it, who has to be there all the time.
    """
    with ending_with(int(os.environ.get(SUPERVISED, os.getppid()))), _ended_by_signals():
        yield from _joined(parallel, facts, device_type)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let control-C and a request to terminate end the process at once, also where it waits for others within torch."""
    if threading.current_thread() is not threading.main_thread():  # which alone may say what signals do
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _joined(parallel: ParallelConfig, facts: Mapping[str, str], device_type: str) -> Iterator[Member]:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(rendezvous("env://", timeout=_MEETING))
    progress = Progress()
    watch = None
    try:
        if ranks != parallel.ranks:
            raise RequestError(
                f"the job has {ranks} ranks, but data * pipeline * tensor is {parallel.ranks}; start {parallel.ranks}"
            )
        _agree(store, rank, ranks, {**facts, "torch": torch.__version__, "Python": platform.python_version()})

        def end(other: int, why: str) -> None:
            _write_down(store, rank, Failure.SILENCE, other, why)
            if not os.environ.get(SUPERVISED):
                print(f"twinfer: error: rank {other} {why}", file=sys.stderr, flush=True)
            os._exit(1)

        def lost() -> None:
            if not os.environ.get(SUPERVISED):
                print(f"twinfer: error: rank {rank} lost the job: who kept its store has ended", file=sys.stderr)
            end_with_children()

        watched = store.clone()
        if os.environ.get(SUPERVISED):
            watched.set_timeout(PATIENCE)  # control-Z may halt who keeps the store
        watch = Watch(watched, rank, ranks, progress, end, lost)
        progress.tell = watch.tell
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
        groups = form_groups(parallel, device_type)
        wire = Wire(groups, progress.wait, keeps_calls=False)
        progress.enter(Doing.READING)
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        yield Member(rank, local_rank, groups, wire, store.clone(), progress)
    except Exception as error:
        _fail(store, rank, error)
    finally:
        if watch is not None:
            watch.end()
    dist.destroy_process_group()


def _agree(store: Store, rank: int, ranks: int, facts: Mapping[str, str]) -> None:
    """Raise `RequestError`, on every rank, where facts differ from those of rank 0."""
    store.set(f"facts/{rank}", json.dumps(dict(facts)))
    all_facts = [json.loads(_facts_of(store, other)) for other in range(ranks)]
    for other, theirs in enumerate(all_facts):
        for what in {**all_facts[0], **theirs}:
            first, here = all_facts[0].get(what), theirs.get(what)
            if first != here:
                raise RequestError(
                    f"rank {other} has {what} {here}, rank 0 has {first}; all ranks of a job must have the same"
                )


def _facts_of(store: Store, rank: int) -> bytes:
    """Return what a rank has told; raises `MachineError` where it does not come."""
    try:
        facts: bytes = store.get(f"facts/{rank}")
    except dist.DistStoreError:
        raise MachineError(f"rank {rank} did not join the job within {_MEETING.seconds} s") from None
    return facts


def _fail(store: Store, rank: int, error: Exception) -> NoReturn:
    """Write down why this rank ends, and end it: what it waits for would never come."""
    if isinstance(error, TwinferError):
        _write_down(store, rank, Failure.ERROR, rank, str(error), refused=True)
        _leave_quietly(2)
        raise error
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST):
        _write_down(store, rank, Failure.LOST, rank, f"lost another rank: {one_line(str(error))}")
        _leave_quietly(1)
        raise MachineError(f"rank {rank} lost another rank of the job: {error}") from None
    _write_down(store, rank, Failure.ERROR, rank, f"raised {one_line(repr(error))}")
    raise error


def _leave_quietly(status: int) -> None:
    """End the process where whoever started it reports why."""
    if os.environ.get(SUPERVISED):
        sys.stdout.flush()
        os._exit(status)


def _write_down(store: Store, rank: int, kind: Failure, blamed: int, why: str, *, refused: bool = False) -> None:
    with suppress(Exception):  # the store is gone where nobody is left to read it
        store.set(failure_of(rank), json.dumps([kind.value, blamed, why, refused]))
