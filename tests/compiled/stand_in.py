"""A stand-in for CUDA graphs on a CPU: what torch.cuda.graph does to memory, without a GPU.

A capture records the operators that a call runs, with the place in memory of every tensor, and leaves what they would
have written as it was. A replay runs them again on whatever lies at those places. As with CUDA:

- Memory that a capture allocates comes from its pool, and all graphs of a pool lie over each other in it. A result is
  garbage until the first replay, and after any other replay.
- Memory from elsewhere is not kept alive. CUDA would read it all the same once it is gone; here that is an error.
- Values cannot be read during a capture, and a graph that was reset cannot run.
- A pool is gone when its last graph is reset. Here a reset spoils all of its memory, which other graphs must survive.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from twinfer.compiled.cpu_graph import CpuGraph, CpuGraphs
from twinfer.compiled.graph import bucket

_POOL_BYTES = 1 << 23
_ALIGNMENT = 64
_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::bincount"}


class CaptureError(Exception):
    """What CUDA forbids, or would do wrong without a word."""


class Pool:
    """Memory shared by graphs."""

    def __init__(self) -> None:
        self.memory = torch.empty(_POOL_BYTES, dtype=torch.uint8)
        self.graphs = 0
        self.peak = 0
        """The most bytes that a capture took."""

    def spoil(self) -> None:
        self.memory.fill_(255)  # NaN as floats, -1 as integers


class Place:
    """Where a tensor lies; in memory that this does not keep alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.form = tensor.storage_offset(), tensor.size(), tensor.stride()
        self.dtype = tensor.dtype
        self.memory = StorageWeakRef(tensor.untyped_storage())

    def tensor(self) -> Tensor:
        storage = None if self.memory.expired() else torch.UntypedStorage._new_with_weak_ptr(self.memory.cdata)
        if storage is None:
            raise CaptureError("a replay would use memory that is gone")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.form)


class Recorder(TorchDispatchMode):
    """Writes down operators and places while a call runs."""

    def __init__(self, pool: Pool, fail_at: int | None) -> None:
        super().__init__()
        self.pool = pool
        self.taken = 0
        self.operators: list[tuple[Any, Any, list[Place]]] = []
        self.overwritten: dict[int, tuple[Place, Tensor]] = {}
        """Memory from elsewhere that an operator wrote to, with what it held."""
        self.fail_at = fail_at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _READS or _finds_size_by_mask(func, args):
            raise CaptureError(f"{func} reads a value during capture")
        if self.fail_at == len(self.operators):
            raise CaptureError("broken off on purpose")
        arguments = (args, kwargs or {})
        self._keep_what_is_written(func, args)
        places = pytree.tree_map_only(Tensor, Place, arguments)
        given = {_address(each) for each in pytree.tree_leaves(arguments) if isinstance(each, Tensor)}
        result = func(*arguments[0], **arguments[1])
        result = pytree.tree_map_only(
            Tensor, lambda each: each if _address(each) in given else self._in_pool(each), result
        )
        self.operators.append((func, places, [Place(each) for each in pytree.tree_leaves(result)]))
        return result

    def put_back(self) -> None:
        """A capture runs nothing: undo what recording it has written."""
        for place, held in self.overwritten.values():
            place.tensor().copy_(held)

    def _in_pool(self, result: Tensor) -> Tensor:
        begin = -(-self.taken // _ALIGNMENT) * _ALIGNMENT
        bytes_needed = result.untyped_storage().nbytes()
        self.taken = begin + bytes_needed
        self.pool.peak = max(self.pool.peak, self.taken)
        if self.taken > _POOL_BYTES:
            raise CaptureError(f"the stand-in's pool of {_POOL_BYTES} bytes is too small")
        form = begin // result.element_size() + result.storage_offset(), result.size(), result.stride()
        placed = torch.empty(0, dtype=result.dtype).set_(self.pool.memory.untyped_storage(), *form)
        return placed.copy_(result)

    def _keep_what_is_written(self, func: Any, args: Any) -> None:
        for described, each in zip(func._schema.arguments, args, strict=False):
            written = described.alias_info is not None and described.alias_info.is_write
            if written and isinstance(each, Tensor) and _address(each) != _address(self.pool.memory):
                whole = torch.empty(0, dtype=torch.uint8).set_(each.untyped_storage())
                self.overwritten.setdefault(_address(each), (Place(whole), whole.clone()))


class Graph:
    """A recorded call."""

    def __init__(self, device: "StandIn", pool: Pool, operators: list[tuple[Any, Any, list[Place]]]) -> None:
        self.device = device
        self.pool = pool
        self.was_reset = False
        self._operators = operators
        pool.graphs += 1

    def replay(self) -> None:
        if self.was_reset:
            raise CaptureError("a replay of a graph that was reset")
        if self.device.fail_next_replay:
            self.device.fail_next_replay = False
            raise CaptureError("broken off on purpose")
        self.pool.spoil()
        for func, places, results in self._operators:
            args, kwargs = pytree.tree_map_only(Place, Place.tensor, places)
            made = [each for each in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for place, each in zip(results, made, strict=True):
                target = place.tensor()
                if _address(target) != _address(each):
                    target.copy_(each)

    def reset(self) -> None:
        if not self.was_reset:
            self.was_reset = True
            self.pool.graphs -= 1
            self.pool.spoil()


class StandIn:
    """`Device` of `compiled.graph`. On request the next capture fails at an operator, or the next replay at once."""

    warm_ups = 2

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.pools: list[Pool] = []
        self.fail_at: int | None = None
        self.fail_next_replay = False

    def pool(self) -> Pool:
        self.pools.append(Pool())
        return self.pools[-1]

    def slots(self, longest: int, capacity: int) -> int:
        return bucket(longest, capacity)

    def alias(self, tensor: Tensor) -> Tensor:
        return tensor  # a `Place` keeps nothing alive

    def move(self, captured: Any, old: Any, new: Any) -> bool:
        return False

    def length(self, captured: Any) -> int:
        return 0

    def write(self, step_3R: Tensor, step: Any) -> None:
        step_3R.copy_(torch.tensor(step))

    def capture(self, call: Callable[[], Tensor], pool: Pool) -> tuple[Graph, Tensor]:
        if pool.graphs == 0 and pool.peak > 0:
            raise CaptureError("the pool is gone: its last graph was reset")
        for _ in range(self.warm_ups):
            call()
        fail_at, self.fail_at = self.fail_at, None
        recorder = Recorder(pool, fail_at)
        try:
            with recorder:
                result = call()
        finally:
            recorder.put_back()
            pool.spoil()
        self.graphs.append(Graph(self, pool, recorder.operators))
        return self.graphs[-1], result


class CountedTapes(CpuGraphs):
    """CpuGraphs, with a list of them as `StandIn` has it."""

    def __init__(self) -> None:
        self.graphs: list[CpuGraph] = []

    def capture(self, call: Callable[[], Tensor], pool: None) -> tuple[CpuGraph, Tensor]:
        captured, result = super().capture(call, pool)
        self.graphs.append(captured)
        return captured, result


def _finds_size_by_mask(func: Any, args: Any) -> bool:
    """x[mask], whose size is a count of values."""
    indices = args[1] if func._schema.name.startswith("aten::index") and len(args) > 1 else []
    return any(isinstance(each, Tensor) and each.dtype is torch.bool for each in pytree.tree_leaves(indices))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
