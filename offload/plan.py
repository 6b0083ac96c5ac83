"""How a memory budget is spent, decided before anything is allocated.

Nothing of the weights is kept but what every layer needs: what memory is left goes to more sequences, more tokens on
their way at once, and reading ahead, in this order, since weights that stay save only themselves, and each further
token that shares a read saves a whole one (the paper's section VI-A). The budget covers what this package allocates,
not the interpreter with torch, which is there before (`base_bytes` says how much that is).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..compiled.compute import accumulation_dtype
from ..compiled.linear import PASS_ROWS
from ..spec.config import ModelConfig, Storage
from ..spec.counts import cache_bytes_per_token
from ..spec.errors import RequestError
from ..spec.moe import MoeConfig
from ..spec.shapes import layer_shapes
from .expert_cache import most_at_once, slot_bytes
from .store import Store

PREFILL_TOKENS = 512
"""Tokens of a prompt that go through a layer at once, as in the compiled path."""

LEAST_SLOTS = 2
MOST_SLOTS = 4
"""Buffers of the ring: with 2 one is read into while the other is used; more than 4 smooth nothing further."""


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
    """Read from the disk in each sweep through the layers."""
    ring_bytes: int
    resident_bytes: int
    experts_kept: int
    """Experts that stay in memory between steps."""
    experts_spare: int
    """Slots that experts are read into, besides."""
    experts_bytes: int
    cache_bytes: int
    """Keys and values."""
    logits_bytes: int
    work_bytes: int
    """What one layer makes on its way, at most."""
    flight_bytes: int
    """Hidden vectors and masks of calls that go through the layers together; a call that exceeds it goes alone."""

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
        """Return all fields and their sum."""
        return {**asdict(self), "total_bytes": self.total_bytes}


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
) -> Plan:
    """Spend a budget on a batch of sequences.

    `expands`: programs run uncompiled, which writes weights out on their way. With `slots` the ring is there already.
    Raises `RequestError`, which names the smallest budget that works, where this one does not.
    """
    least = _least(store, config, batch, reserve, compute, expands, slots or LEAST_SLOTS)
    left = budget - least.total_bytes
    if left < 0:
        raise RequestError(
            f"a memory budget of {budget:,} bytes is too small for {batch} sequences of {reserve} tokens with this "
            f"store; the smallest that works is {least.total_bytes:,} bytes"
        )
    record = least.ring_bytes // least.slots
    whole = batch * call_bytes(config, min(reserve, PREFILL_TOKENS), reserve) * -(-reserve // PREFILL_TOKENS)
    flight = min(left, max(0, whole - least.flight_bytes))
    more = 0 if slots else min(MOST_SLOTS - least.slots, (left - flight) // record)
    spent = _with(least, budget=budget, slots=least.slots + more, flight=least.flight_bytes + flight)
    return with_experts(spent, store, config)


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
    store: Store, config: ModelConfig, *, budget: int, reserve: int, compute: torch.dtype, expands: bool
) -> int:
    """Return how many sequences a budget has room for; raises `RequestError` where it has none for one."""
    one = _least(store, config, 1, reserve, compute, expands, LEAST_SLOTS)
    plan(store, config, budget=budget, batch=1, reserve=reserve, compute=compute, expands=expands)
    each = one.cache_bytes + one.logits_bytes
    return 1 + (budget - one.total_bytes) // each


def call_bytes(config: ModelConfig, tokens: int, slots: int) -> int:
    """Return what tokens of a sequence take on their way: hidden vectors twice, and masks over the slots they read."""
    windows = len({layer.attention.window for layer in config.layers})
    return 4 * tokens * (2 * config.hidden + windows * slots)


def _least(
    store: Store,
    config: ModelConfig,
    batch: int,
    reserve: int,
    compute: torch.dtype,
    expands: bool,
    slots: int,
) -> Plan:
    return Plan(
        budget=0,
        batch=batch,
        reserve=reserve,
        slots=slots,
        store_bytes=store.nbytes,
        step_bytes=sum(record.nbytes for record in store.schedule) + chosen_bytes(store, config, batch),
        ring_bytes=slots * max(record.nbytes for record in store.schedule),
        resident_bytes=store.resident.nbytes,
        experts_kept=0,
        experts_spare=(spare := least_spare(config, batch)),
        experts_bytes=spare * slot_bytes(store),
        cache_bytes=batch * max(2, reserve) * cache_bytes_per_token(config, compute.itemsize),
        logits_bytes=4 * batch * config.vocabulary * accumulation_dtype(compute).itemsize,
        work_bytes=_work_bytes(store, config, min(reserve, PREFILL_TOKENS), reserve, expands, min(batch, PASS_ROWS)),
        flight_bytes=call_bytes(config, min(reserve, PREFILL_TOKENS), reserve),
    )


def _with(least: Plan, *, budget: int, slots: int, flight: int) -> Plan:
    values = asdict(least)
    values |= {"budget": budget, "slots": slots, "ring_bytes": least.ring_bytes // least.slots * slots}
    return Plan(**{**values, "flight_bytes": flight})


def _work_bytes(store: Store, config: ModelConfig, tokens: int, slots: int, expands: bool, rows: int) -> int:
    """Return what a layer, or a block of the head, makes on its way at most, in float32.

    Of many tokens: activations of every width at once, and scores of a block of queries. Of weights: a packed matrix is
    expanded for a product of many rows; uncompiled, also what each of its steps makes.
    """
    most = 0
    for layer in dict.fromkeys(config.layers):
        shapes = layer_shapes(layer, config.hidden).values()
        matrices = [(shape[0], shape[1]) for shape in shapes if len(shape) == 2]
        experts = [(shape[1], shape[2]) for shape in shapes if len(shape) == 3]
        top_k = layer.mlp.router.top_k if isinstance(layer.mlp, MoeConfig) else 0
        widths = sum(outputs for outputs, _ in matrices) + 4 * config.hidden
        largest = max(outputs * inputs for outputs, inputs in _merged(matrices))
        scores = layer.attention.heads * min(tokens, 128) * slots
        widths += top_k * (sum(outputs for outputs, _ in experts) + 3 * config.hidden)
        copied = 0
        if experts:
            one = max(outputs * inputs for outputs, inputs in _merged(experts))
            largest = max(largest, one)
            copied = 2 * rows * top_k * one if expands else 0  # the weights of a pass's choices, and their products
        most = max(
            most, 4 * (2 * tokens * widths + 2 * scores + max(copied, largest * _copies(store.storage, expands)))
        )
    block = math.prod(store.head[0].tensors()[0].shape) * _weights_a_word(store.storage)
    return max(most, 4 * block * _copies(store.storage, expands))


def _merged(matrices: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return shapes as they are prepared: those of equal inputs may be one matrix, so they count as one."""
    inputs = {shape[1] for shape in matrices}
    return [(sum(shape[0] for shape in matrices if shape[1] == each), each) for each in inputs]


def _copies(storage: Storage, expands: bool) -> int:
    if storage is Storage.FLOAT32:
        return 1
    return 4 if expands else 2


def _weights_a_word(storage: Storage) -> int:
    return {Storage.FLOAT32: 1, Storage.BFLOAT16: 2, Storage.INT8: 4, Storage.INT4: 8}[storage]
