"""What the ranks of a pool are asked to do; each function runs on all ranks with equal arguments."""

from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from mutants import MUTANTS  # beside this file
from streamed import differing, stream
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


def extend_streamed(parallel: ParallelConfig, **given: Any) -> dict[str, Any]:
    """Return what `stream` does, for these degrees."""
    return stream(groups_of(parallel), **given)


def differing_layers(
    config: ModelConfig, seed: int, parallel: ParallelConfig, storage: Storage, folder: str
) -> list[str]:
    """Return what `differing` does."""
    resident = path_of(config, seed, parallel, storage, torch.float32)
    return differing(groups_of(parallel), resident, folder)
