"""How a rank's memory budget is spent: as `plan` spends it on one process, on what the rank holds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..compiled.compute import accumulation_dtype
from ..spec.config import ModelConfig
from ..spec.errors import RequestError
from ..spec.parallel import ParallelConfig
from .gathering import readers_of
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
) -> Plan:
    """Spend the budget of a rank on a batch, of which its data group has a part; `store` and `config` are the rank's.

    Keys and values are brought in as whole layers, and where several ranks read a record together there are two buffers
    or more. Raises `RequestError`, which names the smallest budget that works, where this one does not.
    """
    own = -(-batch // parallel.data)
    beside = 4 * (batch - own) * config.vocabulary * accumulation_dtype(compute).itemsize  # logits of other groups
    readers = len(readers_of(parallel, rank))
    slots = LEAST_SLOTS if readers > 1 else 1
    with_block = replace(store, head=store.head or store.table[:1])  # which a stage without a head has no use for
    given: dict[str, Any] = {"batch": own, "reserve": reserve, "compute": compute, "expands": expands}

    def within(most: int) -> Plan | None:
        try:
            made = plan(with_block, config, budget=most - beside, **given)
        except RequestError:
            return None
        return None if made.block_tokens or made.slots < slots else made

    made = within(budget)
    if made is None:
        raise RequestError(
            f"a memory budget of {budget:,} bytes is too small for each rank, with {batch} sequences of {reserve} "
            f"tokens and this store; the smallest that works is {_least(within):,} bytes"
        )
    step = sum(record.nbytes for record in store.schedule) + chosen_bytes(store, config, own)
    return replace(
        made,
        budget=budget,
        batch=batch,
        step_bytes=-(-step // readers),
        logits_bytes=made.logits_bytes + beside,
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
