"""A dense layer as several records: attention with all norms, blocks of the MLP's up, and blocks of its down.

A buffer then holds a part of a layer instead of all of it. Blocks are rows, so that each output is summed over the
same inputs in the same order as in the whole matrix: the up (with its gate) by rows of the inner width, the down by
rows of its outputs. All blocks of a matrix are of one size, for which one graph is compiled.

With heads that have keys of their own, M hidden and F = 4 M gated, attention is 4 M^2 weights, up 8 M^2 and down 4 M^2:

    attention | up, first half | up, second half | down        four records of 4 M^2

Only on processors with AVX-512 are matrices cut within: there a product of some rows has the bits of the whole one
(`compiled.linear.product`). Elsewhere, and for a GPU, up and down are one record each.

Shapes: T tokens, M hidden, F intermediate.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..compiled.embedding import Product
from ..compiled.layers import (
    Attend,
    Table,
    attention_input,
    before_experts,
    between_reductions,
    joined,
    mix,
    mlp_input,
    project,
)
from ..compiled.linear import multiplies_fast
from ..compiled.mlp import inner
from ..compiled.moe import Mlp
from ..compiled.norms import Norm
from ..compiled.packing import ROWS, Matrix
from ..compiled.weights import Layer
from ..spec.config import LayerConfig, MlpConfig, Residual, Storage
from ..spec.shapes import is_matrix, layer_shapes
from ..spec.shard import EXPERTS

BITS = {Storage.FLOAT32: 32, Storage.BFLOAT16: 16, Storage.INT8: 8, Storage.INT4: 4}

LEAST = 1 << 18
"""Bytes of a layer below which it stays whole: a read would cost more than what it brings."""

NO_MATRIX = Matrix(torch.empty(0), None, None, None, None, 0)
"""Stands where a record has none."""


class Blocks(NamedTuple):
    """How many records each of an MLP's matrices is."""

    up: int
    down: int


def blocks_of(config: LayerConfig, hidden: int, storage: Storage, device: str = "cpu") -> Blocks | None:
    """Return how a layer is cut, so that no block of its MLP is larger than the rest of it; None where it is not."""
    sizes = _part_bytes(config, hidden, storage)
    if not isinstance(config.mlp, MlpConfig) or sum(sizes.values()) < LEAST:
        return None
    most = sizes["attention"]
    if device != "cpu":
        return Blocks(1, 1)
    return Blocks(_count(config.mlp.width, sizes["up"], most), _count(hidden, sizes["down"], most))


def block_bytes(config: LayerConfig, hidden: int, storage: Storage, device: str = "cpu") -> int:
    """Return the bytes that a block of the head may have: those of a layer's largest record, or half of a whole one."""
    sizes, blocks = _part_bytes(config, hidden, storage), blocks_of(config, hidden, storage, device)
    if blocks is None:
        return sum(sizes.values()) // 2
    return max(sizes["attention"], sizes["up"] // blocks.up, sizes["down"] // blocks.down)


def _part_bytes(config: LayerConfig, hidden: int, storage: Storage) -> dict[str, int]:
    sizes = dict.fromkeys(("attention", "up", "down"), 0)
    for name, shape in layer_shapes(config, hidden).items():
        if name.startswith(EXPERTS):
            continue
        part = (
            "up"
            if name.startswith(("mlp.up.", "mlp.gate."))
            else "down"
            if name.startswith("mlp.down.")
            else "attention"
        )
        sizes[part] += (BITS[storage] if is_matrix(name) else 32) * math.prod(shape) // 8
    return sizes


def _count(rows: int, nbytes: int, most: int) -> int:
    """Return the least number of equal blocks, each of whole vectors, of at most so many bytes, or nearly that."""
    if not multiplies_fast(torch.empty(0)) or rows % ROWS:
        return 1
    counts = [count for count in range(1, rows // ROWS + 1) if rows // ROWS % count == 0]
    return next((count for count in counts if nbytes <= 1.1 * most * count), counts[-1])


def without_mlp(layer: Layer) -> Layer:
    """Return a layer's first record."""
    return layer._replace(mlp=Mlp(NO_MATRIX, NO_MATRIX))


def lacks_mlp(layer: Layer) -> bool:
    """Return whether it is the first record of a layer that is cut."""
    return isinstance(layer.mlp, Mlp) and layer.mlp.up.outputs == 0


def up_block(matrix: Matrix, config: MlpConfig, place: int, count: int) -> Matrix:
    """Return a block of the up: where gated the gate's rows, then the up's for the same inner numbers."""
    size = config.width // count
    starts = (place * size, config.width + place * size) if config.gated else (place * size,)
    return matrix if count == 1 else _rows(matrix, [(start, start + size) for start in starts])


def down_block(matrix: Matrix, place: int, count: int) -> Matrix:
    """Return a block of the down's outputs."""
    size = matrix.outputs // count
    return matrix if count == 1 else _rows(matrix, [(place * size, (place + 1) * size)])


def _rows(matrix: Matrix, spans: list[tuple[int, int]]) -> Matrix:
    """Return rows of a packed matrix, below one another; spans begin and end between vectors."""
    outputs = sum(end - begin for begin, end in spans)

    def of(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        rows = ROWS if len(part) < matrix.outputs else 1  # that one of its entries is of
        return torch.cat([part[begin // rows : end // rows] for begin, end in spans])

    word = of(matrix.word)
    assert word is not None
    return Matrix(word, of(matrix.scale_N), of(matrix.scale_BGU), of(matrix.min_BGU), of(matrix.bias_N), outputs)


class Halfway(NamedTuple):
    """A layer's hidden vectors between attention and the MLP."""

    x_TM: Tensor
    """The stream that outputs are added to."""
    out_TM: Tensor | None
    """Attention's output where it is added together with the MLP's."""
    read_TM: Tensor
    """The MLP's input."""


def attended(
    x_TM: Tensor,
    weights: Layer,
    table: Table,
    attend: Attend,
    *,
    config: LayerConfig,
    storage: Storage,
    product: Product,
) -> Halfway:
    """Return what a layer has made before its MLP; `weights` may lack that."""

    def attention(normed_TM: Tensor) -> Tensor:
        qkv_TGD = project(normed_TM, weights, config.attention, storage, product)
        return mix(qkv_TGD, weights, table, attend, config.attention, storage, product)

    if config.residual is Residual.SEQUENTIAL:
        added_TM, out_TM = before_experts(x_TM, weights, config, attention)
        x_TM, read_TM = between_reductions(added_TM, out_TM, weights, config)
        return Halfway(x_TM, None, read_TM)
    read_TM = attention_input(x_TM, weights, config)
    return Halfway(x_TM, attention(read_TM), mlp_input(x_TM, read_TM, weights, config))


class Feeding:
    """The MLP of a cut layer on its way through its blocks, for some tokens."""

    def __init__(
        self, half: Halfway, up: Callable[[Tensor, Matrix], Tensor], down: Callable[[Tensor, Matrix], Tensor]
    ) -> None:
        """`up` and `down` take a block, and return some of their numbers for each token."""
        self.half = half
        self._up, self._down = up, down
        self._inner: list[Tensor] = []
        self._out: list[Tensor] = []

    def up(self, block: Matrix) -> None:
        """Go through a block of the up."""
        self._inner.append(self._up(self.half.read_TM, block))

    def down(self, block: Matrix) -> None:
        """Go through a block of the down; all blocks of the up come before."""
        if len(self._inner) > 1:
            self._inner = [torch.cat(self._inner, 1)]
        self._out.append(self._down(self._inner[0], block))

    def out_TM(self) -> Tensor:
        """Return the MLP's output."""
        return self._out[0] if len(self._out) == 1 else torch.cat(self._out, 1)


class Fed(Protocol):
    """Tokens in the middle of a cut layer."""

    def up(self, block: Matrix) -> None: ...

    def down(self, block: Matrix) -> None: ...

    def finish(self, norm: Norm | None) -> None:
        """End the layer; `norm` is that of the MLP's output."""
        ...


def feed_blocks(
    parts: Iterator[Any], blocks: tuple[Sequence[Any], Sequence[Any]], first: Layer, fed: Sequence[Fed]
) -> None:
    """Take tokens through the rest of a cut layer, whose blocks are the next parts; `first` is what came before."""
    ups, downs = blocks
    norm = owned(first.mlp_output_norm)
    for _ in ups:
        block = next(parts)
        for each in fed:
            each.up(block)
    for _ in downs:
        block = next(parts)
        for each in fed:
            each.down(block)
    for each in fed:
        each.finish(norm)


def fed_up(read_TM: Tensor, block: Matrix, config: LayerConfig, storage: Storage, product: Product) -> Tensor:
    """Return what a block of the up makes, activated."""
    assert isinstance(config.mlp, MlpConfig)
    return inner(product(read_TM, block, storage), config.mlp)


def finished(half: Halfway, out_TM: Tensor, norm: Norm | None, config: LayerConfig) -> Tensor:
    """Return the layer's output; `out_TM` is the MLP's, `norm` its output's."""
    return joined(half.x_TM, out_TM if half.out_TM is None else half.out_TM + out_TM, norm, config)


def owned(norm: Norm | None) -> Norm | None:
    """Return a copy, for when the record that it lies in is gone."""
    return None if norm is None else Norm(norm.gain_M.clone(), None if norm.bias_M is None else norm.bias_M.clone())
