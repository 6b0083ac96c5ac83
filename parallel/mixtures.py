"""The pieces of a layer whose experts are shared by ranks: what comes before rows leave, and after they are back.

    attend | choose ( exchange, or nothing ) finish

`choose` does all that needs no other rank: it routes, and feeds the MLPs beside the experts, whose sums can be on their
way while the rows are. Where every rank of a tensor group holds all experts, `choose` serves them too. `finish` weighs
what came back, mixes it with what stands beside, and ends the layer. Where sub-layers are parallel, attention's sum is
on its way meanwhile as well.

Shapes: T tokens, K = top_k, M hidden.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..compiled.embedding import Product
from ..compiled.layers import after_reduce, attention_input, between_reductions, mlp_input
from ..compiled.moe import Moe, beside, mixed, routed, served, weighted
from ..compiled.routing import Routing
from ..compiled.steps import Piece
from ..compiled.weights import Layer
from ..spec.config import LayerConfig, Residual, Storage
from ..spec.moe import MoeConfig


class Chosen(NamedTuple):
    """What a rank knows before rows travel; parts are sums over this rank's columns."""

    stream_TM: Tensor | None
    """What the layer's output is added to; None where that is the layer's own input."""
    read_TM: Tensor
    """What router and experts read."""
    routing: Routing | None
    """None where this rank has served the rows itself."""
    served_TM: Tensor | None
    shared_TM: Tensor | None
    residual_TM: Tensor | None


class MixturePieces(NamedTuple):
    choose: Callable[[Tensor, Tensor | None, Layer], Chosen]
    """(x, reduced output of attention where that is read, weights)."""
    finish: Callable[..., Tensor]
    """(x, read, returned rows [T, K, M] or served ones [T, M], weights of the choices or None, shared, residual,
    attention's sum where it is added here, weights) -> x of the next layer."""


def mixture_pieces(
    layer: LayerConfig, exchanges: bool, storage: Storage, product: Product, piece: Piece, rows: tuple[int, ...]
) -> MixturePieces:
    """Return the pieces of a layer with experts; `exchanges` says whether other ranks hold some of them."""
    config = layer.mlp
    assert isinstance(config, MoeConfig)

    def choose(x_TM: Tensor, out_TM: Tensor | None, weights: Layer) -> Chosen:
        assert isinstance(weights.mlp, Moe)
        if layer.residual is Residual.SEQUENTIAL:
            assert out_TM is not None
            stream_TM, read_TM = between_reductions(x_TM, out_TM, weights, layer)
        else:
            stream_TM, read_TM = None, mlp_input(x_TM, attention_input(x_TM, weights, layer), weights, layer)
        routing = routed(read_TM, weights.mlp, config, product)
        served_TM = None
        if not exchanges:
            served_TM = served(read_TM, routing, weights.mlp, config, storage, product)
        shared_TM, residual_TM = (
            None if part_TM is None else part_TM.contiguous()
            for part_TM in beside(read_TM, weights.mlp, config, storage, product)
        )
        return Chosen(stream_TM, read_TM.clone(), routing if exchanges else None, served_TM, shared_TM, residual_TM)

    def finish(
        x_TM: Tensor,
        read_TM: Tensor,
        returned: Tensor,
        weight_TK: Tensor | None,
        shared_TM: Tensor | None,
        residual_TM: Tensor | None,
        attended_TM: Tensor | None,
        weights: Layer,
    ) -> Tensor:
        assert isinstance(weights.mlp, Moe)
        served_TM = returned if weight_TK is None else weighted(returned, weight_TK).to(x_TM.dtype)
        out_TM = mixed(read_TM, served_TM, shared_TM, residual_TM, weights.mlp, product)
        return after_reduce(x_TM, out_TM if attended_TM is None else attended_TM + out_TM, weights, layer)

    of_rows = ("x_TM", "read_TM", "returned", "weight_TK", "shared_TM", "residual_TM", "attended_TM")
    return MixturePieces(
        piece(choose, dict.fromkeys(("x_TM", "out_TM"), rows)), piece(finish, dict.fromkeys(of_rows, rows))
    )
