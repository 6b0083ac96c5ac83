"""How each path is made ready: one builder a path, and one table of them.

A path is added by naming it in `spec.decoder.Path` and listing its builder in `BUILDERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from twinfer.spec.config import Storage
from twinfer.spec.decoder import Decoder, Path
from twinfer.spec.errors import RequestError
from twinfer.spec.weights import WeightSource

from .store_source import StoreSource

Report = Callable[[str], None]
"""Told in a line each what is being waited for."""


class Compute(StrEnum):
    """The arithmetic, apart from how weights are kept."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.value)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """The arguments of a builder."""

    source: WeightSource
    storage: Storage
    compute: Compute
    device: torch.device
    batches: bool
    """Whether several prompts at once are expected."""
    report: Report | None
    memory_budget: int | None = None
    """Bytes, for a store."""
    dram_budget: int = 0
    """Bytes of it that stay in memory beyond that."""
    routes: bool = False
    """Whether the path is to report which experts it chose; `spec.decoder.Routed`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Built:
    """A path that is ready."""

    decoder: Decoder
    compile_s: float = 0.0
    """Seconds to trace and compile."""


# Paths are imported where they are needed: importing twinfer must bring no compiler.


def _reference(order: Order) -> Built:
    from twinfer.reference.path import ReferencePath

    return Built(
        decoder=ReferencePath(order.source, storage=order.storage, compute=order.compute.dtype, device=order.device)
    )


def _compiled(order: Order) -> Built:
    from twinfer.compiled.path import CompiledPath

    path = CompiledPath(
        order.source,
        storage=order.storage,
        compute=order.compute.dtype,
        device=order.device,
        report=order.report,
        routes=order.routes and bool(order.source.config.mixtures),
    )
    return Built(decoder=path, compile_s=path.compile(batches=order.batches))


def _offload(order: Order) -> Built:
    from twinfer.offload.path import OffloadPath

    from .stores import ONE, shares_in

    if not isinstance(order.source, StoreSource):
        raise RequestError("the path offload runs a store; make one of the model: twinfer offload build MODEL STORE")
    budget = budget_of(order)
    path = OffloadPath(
        shares_in(order.source).of_rank(ONE, 0),
        order.source.config,
        device=order.device,
        budget=budget,
        dram_budget=order.dram_budget,
        compute=order.compute.dtype,
        report=order.report,
    )
    return Built(decoder=path, compile_s=path.compile(batches=order.batches))


def budget_of(order: Order) -> int:
    """Return the memory budget of a store's run; raises `RequestError` for an order that no store can meet."""
    assert isinstance(order.source, StoreSource)
    if order.memory_budget is None:
        raise RequestError("a store runs within a memory budget, which is not given; give one, such as 512MB")
    if order.storage is not order.source.store.storage:
        raise RequestError(f"storage is {order.storage}; this store is in {order.source.store.storage}")
    return order.memory_budget


BUILDERS: dict[Path, Callable[[Order], Built]] = {
    Path.REFERENCE: _reference,
    Path.COMPILED: _compiled,
    Path.OFFLOAD: _offload,
}
"""The builder of every path that `twinfer.load` knows."""
