"""A rank's program whose weights come and go: a run is taken through one layer at a time, or through a part of one.

    attend | read ( up ) ( down ) | end

Each name is a piece; `up` and `down` are called for each block of a cut layer's MLP (`cutting`), and each bar is a sum
over the tensor group. The sums are those of a layer that is whole, of the same numbers, so results are as well.

Shapes: T tokens, M hidden, F the rank's part of the inner width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from ..compiled.embedding import Product
from ..compiled.layers import Attend, Cache, attention_input, between_reductions, joined, mlp_input
from ..compiled.linear import linear_decode, linear_prefill
from ..compiled.norms import Norm
from ..compiled.packing import Matrix
from ..compiled.programs import Program
from ..compiled.steps import Piece, eager
from ..compiled.weights import Layer
from ..parallel.pieces import LayerPieces, rank_pieces
from ..parallel.programs import RankProgram, Tokens
from ..parallel.runs import Run
from ..spec.config import LayerConfig, Residual, Storage
from .cutting import Feeding, Halfway, fed_up, lacks_mlp
from .kv_blocks import KvBlocks
from .kv_stream import Span


class BlockPieces(NamedTuple):
    """The pieces of a cut layer after its attention."""

    read: Callable[[Tensor, Tensor | None, Layer], tuple[Tensor | None, Tensor]]
    """(x, reduced output of attention unless sub-layers are parallel, weights) -> what is added to, None where it is x,
    and what the MLP reads."""
    up: Callable[[Tensor, Matrix], Tensor]
    down: Callable[[Tensor, Matrix], Tensor]
    end: Callable[[Tensor, Tensor, Norm | None], Tensor]
    """(x, reduced output of the MLP, its norm) -> x of the next layer."""


def block_pieces(name: Program, layer: LayerConfig, storage: Storage, piece: Piece) -> BlockPieces:
    """Return the pieces of a program for a cut layer of a rank."""
    fixed = name in (Program.DECODE, Program.DECODE_ROWS)
    product: Product = linear_decode if fixed else linear_prefill
    rows = () if fixed else (0,)

    def read(x_TM: Tensor, out_TM: Tensor | None, weights: Layer) -> tuple[Tensor | None, Tensor]:
        if out_TM is None:
            return None, mlp_input(x_TM, attention_input(x_TM, weights, layer), weights, layer).clone()
        stream_TM, read_TM = between_reductions(x_TM, out_TM, weights, layer)
        return stream_TM, read_TM.clone()

    def up(read_TM: Tensor, block: Matrix) -> Tensor:
        return fed_up(read_TM, block, layer, storage, product)

    def down(inner_TF: Tensor, block: Matrix) -> Tensor:
        return product(inner_TF, block, storage).contiguous()

    def end(x_TM: Tensor, out_TM: Tensor, norm: Norm | None) -> Tensor:
        return joined(x_TM, out_TM, norm, layer)

    both = {"x_TM": rows, "out_TM": rows}
    return BlockPieces(
        piece(read, both), piece(up, {"read_TM": rows}), piece(down, {"inner_TF": rows}), piece(end, both)
    )


class StreamedRankProgram(RankProgram):
    """One program of a rank that streams its share."""

    def __init__(self, name: Program, *given: Any, piece: Piece, cut: dict[LayerConfig, None]) -> None:
        super().__init__(name, *given, cut=cut)
        storage = self._share.model.storage
        self._blocks = {layer: block_pieces(name, layer, storage, piece) for layer in cut}
        config, parallel = self._share.config, self._wire.groups.parallel
        self._uncompiled = rank_pieces(name, config, parallel, storage, eager, self._share.model.compute, cut).layers

    def _attending(self, layer: LayerConfig, cache: Cache | Attend) -> LayerPieces:
        return self._pieces.layers[layer] if isinstance(cache, Cache) else self._uncompiled[layer]

    def begin_layer(
        self, index: int, x_TM: Tensor, weights: Layer, cache: Cache | Attend, positions: Any, tokens: Tokens
    ) -> Feeding:
        """Go through a cut layer up to its MLP."""
        layer = self._share.config.layers[index]
        blocks = self._blocks[layer]
        x_TM, part_TM = self.attend(index, x_TM, weights, cache, positions, tokens)
        sequential = layer.residual is Residual.SEQUENTIAL
        stream_TM, read_TM = blocks.read(x_TM, self.reduced(part_TM, tokens) if sequential else None, weights)
        half = Halfway(x_TM if stream_TM is None else stream_TM, None if sequential else part_TM, read_TM)
        return Feeding(half, blocks.up, blocks.down)

    def end_layer(self, index: int, feeding: Feeding, norm: Norm | None, tokens: Tokens) -> Tensor:
        """Return what leaves a cut layer."""
        part_TM = feeding.out_TM()
        if feeding.half.out_TM is not None:
            part_TM = feeding.half.out_TM + part_TM
        blocks = self._blocks[self._share.config.layers[index]]
        x_TM = blocks.end(feeding.half.x_TM, self.reduced(part_TM, tokens), norm)
        self._on_layer()
        return x_TM


@dataclass(slots=True)
class Moving:
    """A run on its way through the layers."""

    run: Run
    program: StreamedRankProgram
    tokens: Tokens
    x: Tensor
    positions: Any
    spans: Sequence[Span] = ()
    """What its sequences gain."""
    scored: list[Tensor] = field(default_factory=list)
    """For each block of the head that it has met, its products."""
    _cut: tuple[int, Feeding] | None = None

    def layer(self, index: int, config: LayerConfig, weights: Layer, cache: Cache | KvBlocks) -> None:
        """Go through a layer, up to its MLP where that has records of its own."""
        attended: Cache | Attend = (
            cache if isinstance(cache, Cache) else partial(cache.attend, index, weights, config.attention, self.spans)
        )
        given = index, self.x, weights, attended, self.positions, self.tokens
        if lacks_mlp(weights):
            self._cut = index, self.program.begin_layer(*given)
        else:
            self.x = self.program.pass_layer(*given)

    def up(self, block: Matrix) -> None:
        """Go through a block of an MLP's up."""
        assert self._cut is not None
        self._cut[1].up(block)

    def down(self, block: Matrix) -> None:
        """Go through a block of an MLP's down."""
        assert self._cut is not None
        self._cut[1].down(block)

    def finish(self, norm: Norm | None) -> None:
        """End a layer whose MLP had records of its own."""
        assert self._cut is not None
        self.x = self.program.end_layer(*self._cut, norm, self.tokens)
        self._cut = None
