"""What the ranks of a pool are asked to do; each function runs on all ranks with equal arguments."""

from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from mutants import MUTANTS  # beside this file
from torch import Tensor

from twinfer.compiled.path import Mode
from twinfer.oracle.models import RandomSource
from twinfer.parallel.groups import Groups, form_groups
from twinfer.parallel.path import RankPath
from twinfer.parallel.wire import Wire
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.parallel import ParallelConfig

CPU = torch.device("cpu")


@cache
def groups_of(parallel: ParallelConfig) -> Groups:
    return form_groups(parallel, "cpu")


def path_of(
    config: ModelConfig, seed: int, parallel: ParallelConfig, storage: Storage, compute: torch.dtype
) -> RankPath:
    wire = Wire(groups_of(parallel))
    source = RandomSource(config, seed)
    return RankPath(source, wire, storage=storage, compute=compute, device=CPU, mode=Mode.EAGER)


def extend(
    config: ModelConfig,
    seed: int,
    parallel: ParallelConfig,
    storage: Storage,
    calls: list[list[Tensor]],
    compute: torch.dtype = torch.float32,
    every_position: bool = False,
) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]]]:
    """Return the logits of each call on one batch, and the ledger."""
    path = path_of(config, seed, parallel, storage, compute)
    sequences = path.open(len(calls[0]), 1)
    logits: list[Any] = [path.extend(sequences, call, every_position=every_position) for call in calls]
    return logits, [(call.kind.value, call.ranks, call.bytes) for call in path.wire.ledger.calls]


def extend_with(mutant: str, **given: Any) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]]]:
    """Do the same with a seeded fault."""
    with ExitStack() as stack:
        for each in MUTANTS[mutant]():
            stack.enter_context(each)
        return extend(**given)


def events(
    config: ModelConfig, seed: int, parallel: ParallelConfig, tokens: Tensor
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the event log of one call: what begins and what is awaited, the kind, and the ranks."""
    path = path_of(config, seed, parallel, Storage.FLOAT32, torch.float32)
    path.extend(path.open(1, len(tokens)), [tokens])
    return [(step.value, call.kind.value, call.ranks) for step, call in path.wire.ledger.events]


def sums(parallel: ParallelConfig, sizes: tuple[int, ...]) -> tuple[Tensor | int, ...]:
    """Return sums of tensors full of ones, twos and so on by rank; and how many of them went through shared memory."""
    groups = groups_of(parallel)
    wire, shared = Wire(groups), groups.tensor.sums
    assert shared is not None
    before = shared.begun
    found = [wire.all_reduce(torch.full((size,), 1.0 + groups.rank), groups.tensor) for size in sizes]
    return (*found, shared.begun - before)


def recorded(
    config: ModelConfig, parallel: ParallelConfig, storage: Storage, calls: list[list[Tensor]], forgets: set[int]
) -> tuple[list[Any], list[tuple[str, tuple[int, ...], int]], int]:
    """Return the logits of each call, the ledger, and how many steps are recorded at the end.

    Before calls of those numbers, a rank other than the first forgets what it has recorded; so does none if empty.
    """
    path = path_of(config, 1, parallel, storage, torch.float64)
    path._graphs = {}
    sequences, logits = path.open(len(calls[0]), 64), []
    for number, call in enumerate(calls):
        if number in forgets and path.wire.groups.rank:
            path._graphs.clear()
        logits.append(path.extend(sequences, call))
    kept = sum(len(graphs._graphs) for graphs in path._graphs.values())
    return logits, [(call.kind.value, call.ranks, call.bytes) for call in path.wire.ledger.calls], kept
