"""Reading what one rank holds of a file's tensors, and nothing else of them.

Weights that a file keeps merged, transposed, or in an order of its own are found row by row: the order is applied to
row numbers, the numbers that the rank needs are joined to runs, and each run is one read. Example: two key/value groups
of two query heads, one element a head, kept as q0 q1 k0 v0 q2 q3 k1 v1. Rank 1 of 2 needs queries 2 and 3, key 1 and
value 1: rows 4, 5, 6 and 7 of the file, which are one run.

Shapes: N rows of the weights that a tensor fills.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec.config import LayerConfig
from ..spec.shard import Slices, index_of
from .plan import Reading, TensorStore
from .table import Heads


def read_slices(store: TensorStore, reading: Reading, slices: Slices, layer: LayerConfig | None) -> dict[str, Tensor]:
    """Read what the rank holds of the weights that a tensor fills; views, where the store gives views of one run."""
    row_N = torch.arange(sum(reading.fills.values()))
    if reading.stored.reorder is not None:
        assert layer is not None, "only layers hold rows in another order"
        row_N = reading.stored.reorder(row_N, layer)
    of_each = zip(reading.fills, torch.split(row_N, list(reading.fills.values())), strict=True)
    needed = {name: rows[slices[name][0] or slice(None)] for name, rows in of_each if name in slices}
    if reading.stored.heads is not Heads.TOGETHER or len(reading.names) > 1:
        return {name: _heads(store, reading, rows) for name, rows in needed.items()}
    groups = [needed] if reading.stored.reorder is not None else [{name: rows} for name, rows in needed.items()]
    weights: dict[str, Tensor] = {}
    for group in groups:
        if not group:
            continue
        columns = [index_of(slices[name])[1:] for name in group]
        assert all(each == columns[0] for each in columns), "weights that are kept merged are cut by rows"
        tensor = _rows(store, reading, torch.cat(list(group.values())), columns[0])
        weights |= zip(group, torch.split(tensor, [len(rows) for rows in group.values()]), strict=True)
    return weights


def _rows(store: TensorStore, reading: Reading, row_N: Tensor, columns: tuple[slice, ...]) -> Tensor:
    (name,) = reading.names
    sorted_N = row_N.sort().values
    pieces = []
    for run in _runs(sorted_N + reading.skip):
        if reading.stored.one_row:
            pieces.append(_read(store, name, (slice(0, 1), run)).flatten())
            continue
        cuts = (run, *columns)
        piece = _read(store, name, cuts[::-1] if reading.stored.transposed else cuts)
        pieces.append(piece.transpose(0, -1) if reading.stored.transposed else piece)
    tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return tensor if torch.equal(sorted_N, row_N) else tensor[torch.searchsorted(sorted_N, row_N)]


def _heads(store: TensorStore, reading: Reading, row_N: Tensor) -> Tensor:
    """Read numbers that are kept head by head, or once for all heads."""
    size = store.shapes[reading.names[0]][-1]
    heads = slice(int(row_N[0]) // size, int(row_N[-1]) // size + 1)
    if reading.stored.heads is Heads.SHARED:
        return store.read(reading.names[0]).repeat(heads.stop - heads.start)
    if reading.stored.heads is Heads.STACKED:
        return _read(store, reading.names[0], (heads, slice(None))).flatten()
    return torch.cat([store.read(name) for name in reading.names[heads]])


def _runs(sorted_N: Tensor) -> Iterator[slice]:
    """Join the numbers to as few ranges as make them up.

    >>> list(_runs(torch.tensor([4, 5, 6, 9])))
    [slice(4, 7, None), slice(9, 10, None)]
    """
    for run in torch.tensor_split(sorted_N, (sorted_N.diff() != 1).nonzero().flatten() + 1):
        yield slice(int(run[0]), int(run[-1]) + 1)


def _read(store: TensorStore, name: str, cuts: tuple[slice, ...]) -> Tensor:
    """Read a slice, or the tensor itself where that is the whole of it, which stores need not copy."""
    shape = store.shapes[name]
    whole = all(range(size)[cut] == range(size) for size, cut in zip(shape, cuts, strict=True))
    return store.read(name) if whole else store.read_slice(name, cuts)
