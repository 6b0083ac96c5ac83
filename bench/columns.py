"""Columns, timed side by side: the same arithmetic on the same stored weights, done in several ways.

A column's arguments may be copied, and the copies taken in turn, so that weights and caches come from memory as they do
in a model, where everything else is read between two uses of them.

Shapes: N outputs, I inputs.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiled.packing import Matrix, pack, quantize
from ..oracle.case import Inputs
from ..oracle.op import Fast
from ..reference.quantize import (
    GroupQuantized,
    RowQuantized,
    dequantize_groups,
    dequantize_rows,
    quantize_groups,
    quantize_rows,
)
from ..spec.config import Storage
from .machine import last_level_cache_bytes

CACHES_IN_COPIES = 4
"""The copies together are at least this many times the largest cache."""
MOST_COPIES = 1024
"""However small they are."""
_UNKNOWN_CACHE = 32 * 2**20

Arguments = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One way to compute an op on one case."""

    program: Callable[..., Any]
    """Called by keyword; what is compiled, if anything is."""
    arguments: Arguments
    from_memory: tuple[str, ...] = ()
    """The arguments that a model would find in memory, not in a cache: weights, keys, values."""
    as_reference: Callable[[Any], Any] = lambda result: result
    """The result in the form of the op's reference."""
    varying: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Axes of arguments that the compiled program takes at any length, as the path's graphs do."""
    example: Arguments | None = None
    """What it is compiled on; the arguments themselves where None. Such as the path compiles on where lengths vary."""
    passes: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call
    """How the compiled program is called: at once, or for some rows at a time."""
    note: str | None = None

    def copies(self) -> list[Arguments]:
        """The arguments, and as many more of them with copies of what comes from memory as outgrow the caches."""
        cold = {name: self.arguments[name] for name in self.from_memory}
        size = nbytes(cold)
        if size == 0:
            return [self.arguments]
        wanted = CACHES_IN_COPIES * (last_level_cache_bytes() or _UNKNOWN_CACHE)
        more = min(-(-wanted // size), MOST_COPIES) - 1
        return [self.arguments, *({**self.arguments, **copied(cold)} for _ in range(more))]


def fast_column(
    twin: Fast,
    inputs: Inputs,
    *,
    from_memory: tuple[str, ...] = (),
    varying: Mapping[str, tuple[int, ...]] | None = None,
    note: str | None = None,
) -> Column:
    """Return the column of a record's fast function, called with what the record's own adapter calls it with.

    The adapter is run twice: here on a function that notes its arguments, and later on one that hands back what was
    computed from them. Where it calls several times, as for rows in passes, only the first argument may differ.
    """
    signature, calls = inspect.signature(twin.function), list[dict[str, Any]]()

    def noting(*given: Any, **named: Any) -> Any:
        calls.append(dict(signature.bind(*given, **named).arguments))
        return twin.function(*given, **named)

    def as_reference(out: Any) -> Any:
        following = iter(out if len(calls) > 1 else [out])
        return twin.adapt(lambda *_, **__: next(following), inputs)

    twin.adapt(noting, inputs)
    first = next(iter(calls[0]))

    def in_passes(call: Callable[..., Any]) -> Callable[..., list[Any]]:
        return lambda **given: [call(**{**given, first: each}) for each in given[first]]

    several = len(calls) > 1
    return Column(
        program=twin.function,
        arguments={**calls[0], first: [call[first] for call in calls]} if several else calls[0],
        from_memory=from_memory,
        as_reference=as_reference,
        varying=varying or {},
        example=calls[0] if several else None,
        passes=in_passes if several else lambda call: call,
        note=note or twin.name,
    )


def in_turn(call: Callable[..., object], copies: list[Arguments]) -> Callable[[], object]:
    """A callable that calls with the next copy each time."""
    following = cycle(copies)
    return lambda: call(**next(following))


def nbytes(value: Any) -> int:
    """Of every tensor within."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def copied(value: Any) -> Any:
    """The same, every tensor in memory of its own."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def moved(value: Any, device: torch.device) -> Any:
    """The same on a device."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def kept(weight_NI: Tensor, storage: Storage) -> tuple[Tensor, ...]:
    """The matrix in the reference's stored form: itself; or codes, and what turns them back."""
    match storage:
        case Storage.FLOAT32:
            return (weight_NI.to(torch.float32),)
        case Storage.BFLOAT16:
            return (weight_NI.to(torch.bfloat16),)
        case Storage.INT8:
            rows = quantize_rows(weight_NI)
            return rows.quantized_NI, rows.scale_N
        case Storage.INT4:
            groups = quantize_groups(weight_NI)
            return groups.quantized_NI, groups.scale_NG, groups.min_NG


def unkept(parts: tuple[Tensor, ...], storage: Storage) -> Tensor:
    """What `kept` stored, for the reference to multiply by: de-quantized in float32, a bfloat16 matrix as it is."""
    if storage is Storage.INT8:
        return dequantize_rows(RowQuantized(*parts), torch.float32)
    if storage is Storage.INT4:
        return dequantize_groups(GroupQuantized(*parts), torch.float32)
    return parts[0]


def matrix_of(weight_NI: Tensor, storage: Storage) -> Matrix:
    """The matrix as the compiled path's graphs take it."""
    return pack(quantize(weight_NI, storage))
