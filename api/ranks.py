"""A model on many ranks: the path that each process of a job makes ready."""

import hashlib
import time
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from twinfer.spec.errors import RequestError

from .paths import Built, Order, budget_of
from .store_source import StoreSource

if TYPE_CHECKING:
    from twinfer.checkpoint import Checkpoint
    from twinfer.parallel.member import Member


def digest(checkpoint: "Checkpoint") -> str:
    """Return a digest of a model's config and of its files' tables of tensors, which all ranks must share.

    A table is taken as the bytes that the file has: names, dtypes or quantized formats, shapes, and where tensors lie.
    """
    found = hashlib.sha256(repr(checkpoint.config).encode())
    if isinstance(checkpoint.source, Tabled):
        found.update(checkpoint.source.tensor_table())
    if isinstance(checkpoint.source, StoreSource):
        from .stores import shares_in

        stores = shares_in(checkpoint.source).stores
        found.update(repr({rank: store.digest for rank, store in stores.items()}).encode())
    return found.hexdigest()[:16]


@runtime_checkable
class Tabled(Protocol):
    """A source over files that say which tensors they hold."""

    def tensor_table(self) -> bytes: ...


def build(order: Order, member: "Member") -> Built:
    """Read this rank's share and compile its programs; of rank 0 the decoder leads the others."""
    from twinfer.parallel.compiling import compile_in_turn
    from twinfer.parallel.leading import Leader
    from twinfer.parallel.path import RankPath

    report = order.report if member.leads else None
    path: RankPath
    if isinstance(order.source, StoreSource):
        from twinfer.offload.rank_path import StreamedRankPath

        from .stores import shares_in

        if order.device.type != "cpu":
            raise RequestError(f"device is {str(order.device)!r}; ranks run a store on cpu only")
        path = StreamedRankPath(
            shares_in(order.source),
            order.source.config,
            member.wire,
            budget=budget_of(order),
            dram_budget=order.dram_budget,
            compute=order.compute.dtype,
            report=report,
            on_step=member.progress.step,
        )
    else:
        path = RankPath(
            order.source,
            member.wire,
            storage=order.storage,
            compute=order.compute.dtype,
            device=order.device,
            report=report,
            on_step=member.progress.step,
        )
    start = time.perf_counter()
    compile_in_turn(path, member, batches=order.batches)
    return Built(decoder=Leader(path, member) if member.leads else path, compile_s=time.perf_counter() - start)
