"""The compiled pieces of a layer that is cut: attention, a block of the up, a block of the down, and the layer's end.

Each is compiled once for all layers of equal config, whose blocks are all of one size. Where they meet, the whole
layer's graph writes its numbers out as well, so they are the same to the bit.

Shapes: R sequences that gain one token, T prompt tokens of one sequence, S key positions, M hidden, F intermediate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..compiled.attention import DecodeMask
from ..compiled.layers import Cache, Table, attend_prompt, attend_step
from ..compiled.linear import linear_decode, linear_prefill
from ..compiled.norms import Norm
from ..compiled.packing import Matrix
from ..compiled.programs import Program
from ..compiled.steps import DecodePositions, Piece, PrefillPositions, different_windows
from ..compiled.weights import Layer
from ..spec.config import LayerConfig, ModelConfig, Storage
from .cutting import Halfway, attended, fed_up, finished


class CutPieces(NamedTuple):
    """`attention` takes what a program's layers take; see `calls.StreamedProgram`."""

    attention: Callable[..., Halfway]
    up: Callable[[LayerConfig, Tensor, Matrix], Tensor]
    down: Callable[[LayerConfig, Tensor, Matrix], Tensor]
    finish: Callable[[LayerConfig, Halfway, Tensor, Norm | None], Tensor]


def cut_pieces(config: ModelConfig, storage: Storage, piece: Piece, name: Program) -> CutPieces:
    """Return the pieces of a program."""
    prefill = name is Program.PREFILL
    product = linear_prefill if prefill or name is Program.DECODE_MANY else linear_decode
    rows = (0,) if prefill or name is Program.DECODE_MANY else ()
    windows = different_windows(config)
    different = list(dict.fromkeys(config.layers))

    def decode_of(layer: LayerConfig) -> Callable[..., Halfway]:
        def decode(
            x_RM: Tensor,
            weights: Layer,
            cache: Cache,
            table: Table,
            write_R: Tensor,
            position_R: Tensor,
            slot_S: Tensor,
            mask: DecodeMask,
        ) -> Halfway:
            attend = attend_step(weights, cache, write_R, position_R, slot_S, mask, layer.attention)
            return attended(x_RM, weights, table, attend, config=layer, storage=storage, product=product)

        rows_of = dict.fromkeys(("x_RM", "table", "write_R", "position_R"), rows)
        return piece(decode, {**rows_of, "cache": (0,), "slot_S": (0,), "mask": (*rows, 1)})

    def prompt_of(layer: LayerConfig) -> Callable[..., Halfway]:
        def prompt(
            x_TM: Tensor,
            weights: Layer,
            cache: Cache,
            table: Table,
            write_T: Tensor,
            read_S: Tensor,
            mask_TS: Tensor,
        ) -> Halfway:
            attend = attend_prompt(weights, cache, write_T, read_S, mask_TS, layer.attention)
            return attended(x_TM, weights, table, attend, config=layer, storage=storage, product=product)

        tokens_of = dict.fromkeys(("x_TM", "table", "write_T"), (0,))
        return piece(prompt, {**tokens_of, "cache": (0,), "read_S": (0,), "mask_TS": (0, 1)})

    def up_of(layer: LayerConfig) -> Callable[..., Tensor]:
        def up(read_TM: Tensor, block: Matrix) -> Tensor:
            return fed_up(read_TM, block, layer, storage, product)

        return piece(up, {"read_TM": rows})

    def down(inner_TF: Tensor, block: Matrix) -> Tensor:
        return product(inner_TF, block, storage)

    def end_of(layer: LayerConfig) -> Callable[..., Tensor]:
        def end(half: Halfway, out_TM: Tensor, norm: Norm | None) -> Tensor:
            return finished(half, out_TM, norm, layer)

        return piece(end, {"half": rows, "out_TM": rows})

    attentions = {layer: (prompt_of if prefill else decode_of)(layer) for layer in different}
    ups = {layer: up_of(layer) for layer in different}
    downs: dict[LayerConfig, Callable[..., Tensor]] = {layer: piece(down, {"inner_TF": rows}) for layer in different}
    ends = {layer: end_of(layer) for layer in different}

    def attention(
        layer: LayerConfig,
        x_TM: Tensor,
        weights: Layer,
        cache: Cache,
        place: int | None,
        positions: DecodePositions | PrefillPositions,
        *shared: Tensor,
    ) -> Halfway:
        table = None if place is None else positions.tables[place]
        mask: Any = positions.masks[windows.index(layer.attention.window)]
        if isinstance(positions, PrefillPositions):
            return attentions[layer](x_TM, weights, cache, table, positions.write_T, positions.read_S, mask)
        where = table, positions.write_R, positions.position_R, *shared, mask
        return attentions[layer](x_TM, weights, cache, *where)

    return CutPieces(
        attention,
        lambda layer, read_TM, block: ups[layer](read_TM, block),
        lambda layer, inner_TF, block: downs[layer](inner_TF, block),
        lambda layer, half, out_TM, norm: ends[layer](half, out_TM, norm),
    )
