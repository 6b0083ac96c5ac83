"""Reading the linear maps of a layer's experts, in whatever form a file keeps them.

A file may hold one tensor an expert, one of all experts [E, N, I], or one of all their rows [E * N, I]; each expert's
part may be transposed, and hold gate and up after each other or row by row in turns. A range of rows and columns of a
weight is a range of the file's tensor in each of these forms, so a rank reads no more than it holds. Example: gate and
up of 3 rows each, kept in turns as g0 u0 g1 u1 g2 u2. Rows 1 and 2 of up are every second row of 2 .. 6, from the
second on.

Shapes: E experts, N rows and I columns of a weight.
"""

import torch
from torch import Tensor

from ..spec.shard import Slices
from .plan import Reading, TensorStore
from .table import Experts


def read_experts(store: TensorStore, reading: Reading, slices: Slices | None) -> dict[str, Tensor]:
    """Read the weights that the tensors fill, or what a rank holds of them; views, where the store gives views."""
    weights: dict[str, Tensor] = {}
    for place, name in enumerate(reading.fills):
        if slices is not None and name not in slices:
            continue
        experts, rows, *columns = (None,) * 3 if slices is None else slices[name]
        weights[name] = _read_one(store, reading, place, experts, rows, columns[0] if columns else None)
    return weights


def _read_one(
    store: TensorStore,
    reading: Reading,
    place: int,
    experts: slice | None,
    rows: slice | None,
    columns: slice | None,
) -> Tensor:
    """Read these rows and columns of these experts' map; of several kept together, the one at `place`."""
    stored, count = reading.stored, next(iter(reading.fills.values()))
    shape = list(store.shapes[reading.names[0]])
    if stored.experts is Experts.STACKED:
        shape = shape[1:]
    if stored.experts is Experts.FLAT:
        shape[0] //= count
    if stored.transposed:
        shape = shape[::-1]
    own = shape[0] // len(reading.fills)
    first, end, _ = (rows or slice(None)).indices(own)
    turns = len(reading.fills) if stored.interleaved else 1
    start = first * turns if stored.interleaved else first + place * own
    cuts = [slice(start, start + (end - first) * turns)]
    if len(shape) > 1:
        left, right, _ = (columns or slice(None)).indices(shape[1])
        cuts.append(slice(left, right))
    tensor = _read_all(store, reading, count, experts, shape, tuple(cuts[::-1] if stored.transposed else cuts))
    tensor = tensor.transpose(1, 2) if stored.transposed else tensor
    return tensor[:, place::turns] if stored.interleaved else tensor


def _read_all(
    store: TensorStore,
    reading: Reading,
    count: int,
    experts: slice | None,
    shape: list[int],
    cuts: tuple[slice, ...],
) -> Tensor:
    """Read the same part of these experts, by default of all: [E, ...] as the file keeps each."""
    kept = shape[::-1] if reading.stored.transposed else shape
    whole = all(range(size)[cut] == range(size) for size, cut in zip(kept, cuts, strict=True))
    wanted = range(count)[experts or slice(None)]
    if not wanted:
        return torch.empty(0, *(len(range(size)[cut]) for size, cut in zip(kept, cuts, strict=True)))
    match reading.stored.experts:
        case Experts.APART:
            names = [reading.names[expert] for expert in wanted]
            return torch.stack([store.read(name) if whole else store.read_slice(name, cuts) for name in names])
        case Experts.FLAT:
            (name,) = reading.names
            if whole and len(wanted) == count:
                stacked: Tensor = store.read(name).view(count, *kept)
                return stacked
            first = (slice(expert * kept[0] + cuts[0].start, expert * kept[0] + cuts[0].stop) for expert in wanted)
            return torch.stack([store.read_slice(name, (rows, *cuts[1:])) for rows in first])
    (name,) = reading.names
    if whole and len(wanted) == count:
        return store.read(name)
    return store.read_slice(name, (slice(wanted.start, wanted.stop), *cuts))
