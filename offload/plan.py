"""How a memory budget is spent, decided before anything is allocated.

Nothing of the weights is kept but what every layer needs: what memory is left goes to more sequences, more tokens on
their way at once, and reading ahead, in this order, since weights that stay save only themselves, and each further
token that shares a read saves a whole one (the paper's section VI-A). The budget covers what this package allocates,
not the interpreter with torch, which is there before (`base_bytes` says how much that is).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..compiled.compute import accumulation_dtype
from ..compiled.linear import PASS_ROWS
from ..spec.config import LayerConfig, MlpConfig, ModelConfig
from ..spec.errors import RequestError
from ..spec.moe import MoeConfig
from .dram import spread
from .expert_memory import most_at_once, slot_bytes
from .kv_stream import BUFFERS, away_layers, whole_capacity
from .store import Store
from .work import work_bytes

PREFILL_TOKENS = 512
"""Tokens of a prompt that go through a layer at once, as in the compiled path."""

_BLOCK_BYTES = 1 << 19
"""Keys and values that are brought in at a time at most, where not even one layer's fit."""

LEAST_SLOTS = 2
MOST_SLOTS = 4
"""Buffers of the ring: with 2 one is read into while the other is used; more than 4 smooth nothing further.

Where 2 do not fit, 1 serves: nothing is read ahead then.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bytes for each purpose, and what they are for."""

    budget: int
    batch: int
    reserve: int
    """Tokens of each sequence."""
    slots: int
    """Buffers of the ring."""
    store_bytes: int
    """On the disk."""
    step_bytes: int
    """Read from the disk in each sweep through the layers, once DRAM holds what it keeps."""
    dram_budget: int
    dram_records: tuple[int, ...]
    """The places in the schedule of what DRAM keeps."""
    dram_caches: tuple[int, ...]
    """The layers that are away whose keys and values lie in DRAM."""
    dram_experts: int
    """Experts that DRAM keeps."""
    dram_bytes: int
    """All that DRAM keeps."""
    staging_bytes: int
    """Host memory besides through which a device with a memory of its own gets what the disk has."""
    copied_bytes: int
    """Copied into the ring in each sweep: from DRAM, and where the device has a memory of its own all records."""
    ring_bytes: int
    resident_bytes: int
    experts_kept: int
    """Experts that stay in memory between steps."""
    experts_spare: int
    """Slots that experts are read into, besides."""
    experts_bytes: int
    cache_bytes: int
    """Keys and values that stay in memory, and buffers for those that do not."""
    away_layers: int
    """Layers whose keys and values lie in DRAM or in a file."""
    away_bytes: int
    """What these take there."""
    block_tokens: int
    """Tokens of them that are brought in at a time; 0 where whole layers are."""
    logits_bytes: int
    work_bytes: int
    """What one layer makes on its way, at most."""
    flight_bytes: int
    """Hidden vectors and masks of calls that go through the layers together; a call that exceeds it goes alone."""
    prompt_bytes: int
    """Those of one sequence's prompt, or a piece of it."""

    @property
    def total_bytes(self) -> int:
        return (
            self.ring_bytes
            + self.resident_bytes
            + self.experts_bytes
            + self.cache_bytes
            + self.logits_bytes
            + self.work_bytes
            + self.flight_bytes
        )

    def as_json(self) -> dict[str, Any]:
        """Return all fields, and what the device takes; of what DRAM keeps, how many records and layers that is."""
        kept = {name: len(getattr(self, name)) for name in ("dram_records", "dram_caches")}
        return {**asdict(self), **kept, "total_bytes": self.total_bytes}

    def fetch_s(self, disk: float, copies: float) -> float:
        """Return how long a sweep's reads and copies take by bytes a second; they go on at once."""
        return max(self.step_bytes / disk, self.copied_bytes / copies)


def plan(
    store: Store,
    config: ModelConfig,
    *,
    budget: int,
    batch: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    slots: int | None = None,
    dram_budget: int = 0,
    staged: bool = False,
) -> Plan:
    """Spend a budget on a batch of sequences, and that of DRAM on what the disk would have to be read for.

    `expands`: programs run uncompiled, which writes weights out on their way. With `slots` the ring is there already.
    `staged`: the budget is of a device with a memory of its own.
    Raises `RequestError`, which names the smallest budget that works, where this one does not.
    """
    given = store, config, batch, reserve, compute, expands
    least = _fitting(*given, (slots,) if slots else (LEAST_SLOTS, 1), budget)
    left = budget - least.total_bytes
    if left < 0:
        raise RequestError(
            f"a memory budget of {budget:,} bytes is too small for {batch} sequences of {reserve} tokens with this "
            f"store; the smallest that works is {least.total_bytes:,} bytes"
        )
    record = least.ring_bytes // least.slots
    whole = batch * call_bytes(store, config, min(reserve, PREFILL_TOKENS), reserve) * -(-reserve // PREFILL_TOKENS)
    flight = min(left, max(0, whole - least.flight_bytes))
    more = 0 if slots else min(MOST_SLOTS - least.slots, (left - flight) // record)
    spent = _with(least, budget=budget, slots=least.slots + more, flight=least.flight_bytes + flight)
    spent = with_experts(spent, store, config)
    spent = _with_dram(spent, store, config, dram_budget, compute)
    return _staged(spent, store, config, compute) if staged else spent


def _with_dram(spent: Plan, store: Store, config: ModelConfig, room: int, compute: torch.dtype) -> Plan:
    """Keep in DRAM what fits there: keys and values, which would be written too, records, and experts last.

    Those may be read in a step, records are.
    """
    away = away_layers(len(config.layers), spent.away_layers)
    sizes = _away_sizes(spent, config, compute)
    caches = spread(sizes, room)
    of_caches = sum(sizes[place] for place in caches)
    sizes = [record.nbytes for record in store.schedule]
    records = spread(sizes, room - of_caches)
    of_records = sum(sizes[index] for index in records)
    size, experts = slot_bytes(store), sum(map(len, store.experts))
    kept = min(experts, (room - of_caches - of_records) // size) if size else 0
    chosen = chosen_bytes(store, config, spent.batch) if experts and kept == experts else 0
    return replace(
        spent,
        dram_budget=room,
        dram_caches=tuple(away[place] for place in caches),
        dram_records=records,
        dram_experts=kept,
        dram_bytes=of_caches + of_records + kept * size,
        step_bytes=spent.step_bytes - of_records - chosen,
        copied_bytes=of_records + chosen,
    )


def _away_sizes(spent: Plan, config: ModelConfig, compute: torch.dtype) -> list[int]:
    """Return the bytes of each layer's keys and values that are away."""
    layers = [config.layers[index] for index in away_layers(len(config.layers), spent.away_layers)]
    capacity = whole_capacity(layers, spent.reserve, compute) if layers else 0
    return [spent.batch * capacity * _token_bytes(layer, compute) for layer in layers]


def _staged(spent: Plan, store: Store, config: ModelConfig, compute: torch.dtype) -> Plan:
    """Count what a device with a memory of its own needs of the host's: a buffer for each of its own."""
    whole = BUFFERS * max(_away_sizes(spent, config, compute), default=0)
    away = spent.cache_bytes if spent.block_tokens else whole
    staging = spent.ring_bytes + spent.experts_spare * slot_bytes(store) + away
    return replace(spent, staging_bytes=staging, copied_bytes=spent.step_bytes + spent.copied_bytes)


def with_experts(spent: Plan, store: Store, config: ModelConfig) -> Plan:
    """Spend what is left on experts: with several sequences first on a slot for each of a layer, then on keeping.

    With these, the prompts of a batch share what is read of a layer.
    """
    size, experts = slot_bytes(store), [len(of_layer) for of_layer in store.experts]
    if size == 0:
        return spent
    left = (spent.budget - spent.total_bytes) // size
    spare = min(left, max(0, max(experts) - spent.experts_spare)) if spent.batch > 1 else 0
    kept = min(left - spare, sum(experts))
    total = (spent.experts_spare + spare + kept) * size
    return replace(spent, experts_kept=kept, experts_spare=spent.experts_spare + spare, experts_bytes=total)


def chosen_bytes(store: Store, config: ModelConfig, batch: int) -> int:
    """Return the bytes of the experts that a step of a batch needs at most, which it reads where none is kept."""
    total = 0
    for layer, of_layer in zip(config.layers, store.experts, strict=True):
        if isinstance(layer.mlp, MoeConfig):
            up, down = of_layer[0]
            total += min(len(of_layer), batch * layer.mlp.router.top_k) * (up.nbytes + down.nbytes)
    return total


def least_spare(config: ModelConfig, batch: int) -> int:
    """Return how many slots a step must have to read into: for all that a pass can choose, and two guesses.

    A wrong guess may still be being read when the next one is made.
    """
    most = most_at_once(config, min(batch, PASS_ROWS))
    return most + 2 if most else 0


def most_batch(
    store: Store,
    config: ModelConfig,
    *,
    budget: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    away: bool = True,
) -> int:
    """Return how many sequences a budget has room for; raises `RequestError` where it has none for one.

    `away`: keys and values may lie in a file.
    """
    plan(store, config, budget=budget, batch=1, reserve=reserve, compute=compute, expands=expands)
    layers = (0, len(config.layers)) if away else (0,)
    most = 1
    for count in layers:
        one, two = (_least(store, config, each, reserve, compute, expands, LEAST_SLOTS, count) for each in (1, 2))
        more = two.total_bytes - one.total_bytes
        most = max(most, 1 + (budget - one.total_bytes) // more)
    return most


def call_bytes(store: Store, config: ModelConfig, tokens: int, slots: int) -> int:
    """Return what tokens of a sequence take on their way: hidden vectors, and masks over the slots they read.

    Hidden vectors are there twice; in a layer that is cut three times besides, and the MLP's inner numbers.
    """
    windows = len({layer.attention.window for layer in config.layers})
    widths = [
        layer.mlp.width + 3 * config.hidden
        for layer, (ups, _) in zip(config.layers, store.mlp, strict=True)
        if ups and isinstance(layer.mlp, MlpConfig)
    ]
    halfway = max(widths, default=0)
    return 4 * tokens * (2 * config.hidden + windows * slots + halfway)


def _fitting(
    store: Store,
    config: ModelConfig,
    batch: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    slots: Sequence[int],
    budget: int,
) -> Plan:
    """Return the first that fits: with the fewest layers away, then fewer buffers, then blocks; else the smallest."""
    given, layers = (store, config, batch, reserve, compute), len(config.layers)
    plans = [_least(*given, expands, each, away) for each in slots for away in range(layers + 1)]
    for each in slots:
        plans.append(_in_blocks(_least(*given, True, each, layers), config, compute))
    fitting = (each for each in plans if each.total_bytes <= budget)
    return next(fitting, min(plans, key=lambda one: one.total_bytes))


def _in_blocks(least: Plan, config: ModelConfig, compute: torch.dtype) -> Plan:
    """Return a plan with no layer's caches in memory; layers are computed with uncompiled."""
    unit, most = whole_capacity(config.layers, 1, compute), max(_token_bytes(each, compute) for each in config.layers)
    tokens = max(1, min(_BLOCK_BYTES, least.away_bytes // len(config.layers) // 8) // (unit * most)) * unit
    return replace(least, cache_bytes=BUFFERS * tokens * most, block_tokens=tokens)


def _least(
    store: Store,
    config: ModelConfig,
    batch: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    slots: int,
    away: int,
) -> Plan:
    """Return the plan that takes least with so many layers' keys and values away."""
    away_indices = set(away_layers(len(config.layers), away))
    moved = [layer for index, layer in enumerate(config.layers) if index in away_indices]
    stays = [layer for index, layer in enumerate(config.layers) if index not in away_indices]
    capacity = whole_capacity(moved, reserve, compute) if moved else max(2, reserve)
    of_layer = [batch * capacity * _token_bytes(layer, compute) for layer in moved]
    return Plan(
        budget=0,
        batch=batch,
        reserve=reserve,
        slots=slots,
        store_bytes=store.nbytes,
        step_bytes=sum(record.nbytes for record in store.schedule) + chosen_bytes(store, config, batch),
        dram_budget=0,
        dram_records=(),
        dram_caches=(),
        dram_experts=0,
        dram_bytes=0,
        staging_bytes=0,
        copied_bytes=0,
        ring_bytes=slots * max(record.nbytes for record in store.schedule),
        resident_bytes=store.resident.nbytes,
        experts_kept=0,
        experts_spare=(spare := least_spare(config, batch)),
        experts_bytes=spare * slot_bytes(store),
        cache_bytes=batch * capacity * sum(_token_bytes(layer, compute) for layer in stays)
        + BUFFERS * max(of_layer, default=0),
        away_layers=away,
        away_bytes=sum(of_layer),
        block_tokens=0,
        logits_bytes=4 * batch * config.vocabulary * accumulation_dtype(compute).itemsize,
        work_bytes=work_bytes(store, config, min(reserve, PREFILL_TOKENS), reserve, expands, min(batch, PASS_ROWS)),
        flight_bytes=call_bytes(store, config, min(reserve, PREFILL_TOKENS), reserve),
        prompt_bytes=call_bytes(store, config, min(reserve, PREFILL_TOKENS), reserve),
    )


def _token_bytes(layer: LayerConfig, compute: torch.dtype) -> int:
    return 2 * layer.attention.kv_heads * layer.attention.head_size * compute.itemsize


def _with(least: Plan, *, budget: int, slots: int, flight: int) -> Plan:
    values = asdict(least)
    values |= {"budget": budget, "slots": slots, "ring_bytes": least.ring_bytes // least.slots * slots}
    return Plan(**{**values, "flight_bytes": flight})
