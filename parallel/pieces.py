"""The pieces of a rank's programs: the compiled layer, cut exactly where ranks have to agree.

    decode, prefill    lookup | entry ( attend | feed | close )* last |

Each name is a piece, one graph without breaks; each bar is a collective. Nothing is fused across one (the paper's rule)
but everything between two is, as on one device. Where sub-layers are parallel, `attend` returns the sum of both
and there is no `feed`. A norm over all heads cuts `attend` in two (`head_norms`); experts take the place of `feed` and
`close` (`mixtures`).

What it relies on: whatever differs from rank to rank is an argument (the rank's first token), never a constant, so that
all ranks of a stage run the same programs and all but the first find them in the cache.

Shapes: R sequences that gain one token, T tokens of one sequence, S key positions, W table width, M hidden, D head
size, G = H + 2 K heads of a rank, V the rank's piece of the vocabulary.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiled.compute import accumulation_dtype
from ..compiled.embedding import Embedding, Product, embed_rows
from ..compiled.layers import (
    Attend,
    Cache,
    Table,
    after_reduce,
    attend_prompt,
    attend_step,
    attention_input,
    before_experts,
    before_reduce,
    between_reductions,
    feed,
    mix,
    project,
)
from ..compiled.linear import linear_decode, linear_prefill, lookup
from ..compiled.packing import Matrix
from ..compiled.programs import Program
from ..compiled.steps import (
    DecodePositions,
    Piece,
    PrefillPositions,
    decode_positions,
    different_windows,
    for_projection,
    prefill_positions,
)
from ..compiled.weights import Head, Layer, Rotation
from ..spec.config import LayerConfig, ModelConfig, QkNormSpan, Residual, Storage
from ..spec.moe import MoeConfig
from ..spec.parallel import ParallelConfig
from .head_norms import Sums, centered, centers, normed, squares, sums
from .mixtures import MixturePieces, mixture_pieces

Partial = tuple[Tensor | None, Tensor]
"""What the reduced sum is added to, None where it is the piece's own x; and this rank's part of the sum."""


class LayerPieces(NamedTuple):
    project: Callable[[Tensor, Layer], tuple[Tensor, Sums]] | None
    """(x, weights) -> heads [T, G, D] and the sums to reduce; None without a norm over the heads of all ranks."""
    center: Callable[[Tensor, Sums], tuple[Tensor, Sums]] | None
    """(heads, reduced sums) -> the same, centered; None where nothing is."""
    attend: Callable[..., Partial]
    """(x, heads and reduced squares if normed so, weights, cache, rotary table, rows, slots, mask); uncompiled, instead
    of the cache also what attends to one that is elsewhere."""
    feed: Callable[[Tensor, Tensor, Layer], Partial] | None
    """(x, reduced output of attention, weights); None where sub-layers are parallel, with experts, or cut."""
    close: Callable[[Tensor, Tensor, Layer], Tensor]
    """(x, reduced output of the MLP, weights) -> x of the next layer."""
    mixture: MixturePieces | None
    """What takes the place of `feed` and `close` where there are experts."""


class RankPieces(NamedTuple):
    lookup: Callable[[Matrix, Tensor, Tensor], Tensor]
    """(table, first token of the rank, tokens) -> rows [T, W], zeros for other ranks' tokens."""
    entry: Callable[..., tuple[Tensor | None, Any]]
    """(reduced rows, embedding, rotations, positions, first slots, slots) -> x, and what all layers have in common."""
    layers: dict[LayerConfig, LayerPieces]
    last: Callable[[Tensor, Head], tuple[Tensor, Tensor]]
    """(x, head) -> hidden vectors [T, W], and this rank's logits: of every row, in a prefill of the last one."""
    windows: list[int | None]


def rank_pieces(
    program: Program,
    config: ModelConfig,
    parallel: ParallelConfig,
    storage: Storage,
    piece: Piece,
    compute: torch.dtype,
    cut: Collection[LayerConfig] = (),
) -> RankPieces:
    """Return the pieces of a program; `config` is the rank's own. The MLPs of layers in `cut` are fed by the caller."""
    decodes, fixed = program is not Program.PREFILL, program in (Program.DECODE, Program.DECODE_ROWS)
    product = linear_decode if fixed else linear_prefill
    windows, rows = different_windows(config), () if fixed else (0,)

    def looked_up(table: Matrix, first_1: Tensor, token_T: Tensor) -> Tensor:
        local_T = token_T - first_1
        held_T = (local_T >= 0) & (local_T < table.outputs)
        place_T = torch.where(held_T, local_T, 0)
        row_TW = lookup(place_T, table, storage, config.table_width, accumulation_dtype(compute))
        return torch.where(held_T[:, None], row_TW, 0).contiguous()

    def entry(
        x_TW: Tensor | None,
        embedding: Embedding | None,
        rotations: tuple[Rotation, ...],
        position_T: Tensor,
        start_T: Tensor,
        slot_S: Tensor,
    ) -> tuple[Tensor | None, DecodePositions | PrefillPositions]:
        x_TM = None
        if x_TW is not None and embedding is not None:
            x_TM = embed_rows(x_TW, position_T, embedding, config, storage, product, compute=compute)
        given = rotations, windows
        if decodes:
            step_3R = torch.stack((position_T, position_T, start_T))  # whose first row, tokens, is not looked at
            return x_TM, decode_positions(*given, step_3R, slot_S, compute)
        return x_TM, prefill_positions(*given, position_T, start_T, slot_S, compute)

    def last(x_TM: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        hidden_TW = for_projection(x_TM, head, config, storage, product)
        last_RW = hidden_TW if decodes else hidden_TW[-1:]
        last_RW = last_RW.to(accumulation_dtype(last_RW.dtype))
        return hidden_TW, (product if decodes else linear_decode)(last_RW, head.projection, storage)

    starts = rows if decodes else ()
    return RankPieces(
        piece(looked_up, {"token_T": rows}),
        piece(entry, {"x_TW": rows, "position_T": rows, "start_T": starts, "slot_S": (0,)}),
        {
            layer: _layer_pieces(layer, parallel, storage, product, piece, rows, decodes, cut=layer in cut)
            for layer in dict.fromkeys(config.layers)
        },
        piece(last, {"x_TM": rows}),
        windows,
    )


def _layer_pieces(
    layer: LayerConfig,
    parallel: ParallelConfig,
    storage: Storage,
    product: Product,
    piece: Piece,
    rows: tuple[int, ...],
    decodes: bool,
    *,
    cut: bool,
) -> LayerPieces:
    config, ranks, has_experts = layer.attention, parallel.tensor, isinstance(layer.mlp, MoeConfig)

    def attend_with(
        weights: Layer, cache: Cache | Attend, row_T: tuple[Tensor, ...], slot_S: Tensor, mask: Any
    ) -> Attend:
        if not isinstance(cache, Cache):
            return cache
        if decodes:
            write_T, position_T = row_T
            return attend_step(weights, cache, write_T, position_T, slot_S, mask, config)
        (write_T,) = row_T
        return attend_prompt(weights, cache, write_T, slot_S, mask, config)

    def attended(x_TM: Tensor, attention: Callable[[Tensor], Tensor], weights: Layer) -> Partial:
        if has_experts or cut:
            return _of_own(x_TM, *before_experts(x_TM, weights, layer, attention))

        def mlp(normed_TM: Tensor) -> Tensor:
            return feed(normed_TM, weights, layer, storage, product)

        return _of_own(x_TM, *before_reduce(x_TM, weights, layer, attention, mlp))

    def attend(
        x_TM: Tensor,
        weights: Layer,
        cache: Cache | Attend,
        table: Table,
        row_T: tuple[Tensor, ...],
        slot_S: Tensor,
        mask: Any,
    ) -> Partial:
        def attention(read_TM: Tensor) -> Tensor:
            how = attend_with(weights, cache, row_T, slot_S, mask)
            qkv_TGD = project(read_TM, weights, config, storage, product)
            return mix(qkv_TGD, weights, table, how, config, storage, product)

        return attended(x_TM, attention, weights)

    def attend_normed(
        x_TM: Tensor,
        qkv_TGD: Tensor,
        square_2T1: Sums,
        weights: Layer,
        cache: Cache | Attend,
        table: Table,
        row_T: tuple[Tensor, ...],
        slot_S: Tensor,
        mask: Any,
    ) -> Partial:
        def attention(_: Tensor) -> Tensor:
            how = attend_with(weights, cache, row_T, slot_S, mask)
            normed_TGD = normed(qkv_TGD, square_2T1, weights, config, ranks, x_TM.dtype)
            unnormed = weights._replace(query_norm=None, key_norm=None)
            return mix(normed_TGD, unnormed, table, how, config, storage, product)

        return attended(x_TM, attention, weights)

    def projected(x_TM: Tensor, weights: Layer) -> tuple[Tensor, Sums]:
        assert config.qk_norm is not None
        qkv_TGD = project(attention_input(x_TM, weights, layer), weights, config, storage, product)
        return qkv_TGD, (sums if centers(config.qk_norm) else squares)(qkv_TGD, config)

    def center(qkv_TGD: Tensor, sum_2T1: Sums) -> tuple[Tensor, Sums]:
        qkv_TGD = centered(qkv_TGD, sum_2T1, config, ranks)
        return qkv_TGD, squares(qkv_TGD, config)

    def fed(x_TM: Tensor, out_TM: Tensor, weights: Layer) -> Partial:
        stream_TM, read_TM = between_reductions(x_TM, out_TM, weights, layer)
        return stream_TM, feed(read_TM, weights, layer, storage, product).contiguous()

    def close(x_TM: Tensor, out_TM: Tensor, weights: Layer) -> Tensor:
        return after_reduce(x_TM, out_TM, weights, layer)

    of_rows = {**dict.fromkeys(("x_TM", "table", "row_T"), rows), "cache": (0,), "slot_S": (0,)}
    of_rows["mask"] = (*rows, 1) if decodes else (0, 1)
    over_ranks = ranks > 1 and config.qk_norm is not None and config.qk_norm_span is QkNormSpan.ALL_HEADS
    of_heads = {"qkv_TGD": rows, "sum_2T1": rows}
    both = {"x_TM": rows, "out_TM": rows}
    return LayerPieces(
        piece(projected, {"x_TM": rows}) if over_ranks else None,
        piece(center, of_heads) if over_ranks and config.qk_norm and centers(config.qk_norm) else None,
        piece(attend_normed, {**of_rows, "qkv_TGD": rows, "square_2T1": rows})
        if over_ranks
        else piece(attend, of_rows),
        piece(fed, both) if layer.residual is Residual.SEQUENTIAL and not has_experts and not cut else None,
        piece(close, both),
        mixture_pieces(layer, parallel.expert * parallel.expert_slices > 1, storage, product, piece, rows)
        if has_experts
        else None,
    )


def _of_own(x_TM: Tensor, stream_TM: Tensor, part_TM: Tensor) -> Partial:
    """Leave out what is added to where it is the argument itself, which no graph should hand back.

    Rows of what is reduced lie side by side: packed products are views of longer rows.
    """
    return None if stream_TM is x_TM else stream_TM, part_TM.contiguous()
