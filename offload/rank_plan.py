"""How a rank's memory budget is spent: as `plan` spends it on one process, on what the rank holds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..compiled.compute import accumulation_dtype
from ..spec.config import ModelConfig
from ..spec.errors import RequestError
from ..spec.parallel import ParallelConfig
from .dram import spread
from .form import Record
from .gathering import part_of, readers_of
from .plan import LEAST_SLOTS, Plan, chosen_bytes, plan
from .store import Store


def plan_of_rank(
    store: Store,
    config: ModelConfig,
    parallel: ParallelConfig,
    rank: int,
    *,
    budget: int,
    batch: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    dram_budget: int = 0,
) -> Plan:
    """Spend the budgets of a rank on a batch, of which its data group has a part; `store` and `config` are the rank's.

    Where several ranks read a record together there are two buffers or more. Raises `RequestError`, which names the
    smallest budget that works, where this one does not.
    """
    given: dict[str, Any] = {"batch": batch, "reserve": reserve, "compute": compute, "expands": expands}
    made = fitting_plan(store, config, parallel, rank, budget=budget, **given, dram_budget=dram_budget)
    if made is None:
        raise too_small(budget, batch, reserve, least_budget(store, config, parallel, rank, **given))
    return made


def too_small(budget: int, batch: int, reserve: int, least: int) -> RequestError:
    """Return the error of a budget with which ranks cannot run."""
    return RequestError(
        f"a memory budget of {budget:,} bytes is too small for each rank, with {batch} sequences of {reserve} "
        f"tokens and this store; the smallest that works is {least:,} bytes"
    )


def least_budget(store: Store, config: ModelConfig, parallel: ParallelConfig, rank: int, **given: Any) -> int:
    """Return the smallest budget of a rank that works; `given` is what `fitting_plan` takes besides."""
    return _least(lambda most: fitting_plan(store, config, parallel, rank, budget=most, **given))


def fitting_plan(
    store: Store,
    config: ModelConfig,
    parallel: ParallelConfig,
    rank: int,
    *,
    budget: int,
    batch: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    dram_budget: int = 0,
) -> Plan | None:
    """Return the same plan, or None where the budget is too small."""
    own = -(-batch // parallel.data)
    beside = 4 * (batch - own) * config.vocabulary * accumulation_dtype(compute).itemsize  # logits of other groups
    readers = readers_of(parallel, rank)
    with_block = replace(store, head=store.head or store.table[:1])  # which a stage without a head has no use for
    given: dict[str, Any] = {"batch": own, "reserve": reserve, "compute": compute, "expands": expands}
    try:
        made = plan(with_block, config, budget=budget - beside, **given)
        if len(readers) > 1 and made.slots < LEAST_SLOTS:
            made = plan(with_block, config, budget=budget - beside, **given, slots=LEAST_SLOTS)
    except RequestError:
        return None
    sizes = [record.nbytes for record in read_by(store, parallel, rank).schedule]
    kept = spread(sizes, dram_budget)
    kept_bytes = sum(sizes[place] for place in kept)
    return replace(
        made,
        budget=budget,
        batch=batch,
        step_bytes=sum(sizes) - kept_bytes + -(-chosen_bytes(store, config, own) // len(readers)),
        dram_budget=dram_budget,
        dram_records=kept,
        dram_bytes=kept_bytes,
        copied_bytes=kept_bytes,
        logits_bytes=made.logits_bytes + beside,
    )


def read_by(store: Store, parallel: ParallelConfig, rank: int) -> Store:
    """Return a rank's store with, of each record of the schedule, what this one of its readers reads."""
    readers = readers_of(parallel, rank)

    def part(record: Record) -> Record:
        return part_of(record, len(readers), readers.index(rank)) if len(readers) > 1 else record

    return replace(
        store,
        layers=tuple(map(part, store.layers)),
        mlp=tuple((tuple(map(part, ups)), tuple(map(part, downs))) for ups, downs in store.mlp),
        head=tuple(map(part, store.head)),
    )


def _least(within: Callable[[int], Plan | None]) -> int:
    """Return the smallest budget within which a plan can be made."""
    most = 1
    while within(most) is None:
        most *= 2
    least = most // 2 + 1
    while least < most:
        middle = (least + most) // 2
        least, most = (least, middle) if within(middle) else (middle + 1, most)
    return most
