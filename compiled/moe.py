"""A mixture of experts where a dense layer has one MLP: routing, the chosen experts' products, and their weighted sum.

Why it is faster: see `routing` and `experts`. Routers and other maps of a token to a few numbers are float32 in every
storage, and what they multiply is float32 or wider.

Shapes: T tokens, M hidden, F intermediate, E experts, K = top_k, A = T * K choices, P tokens of the longest call.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import MlpConfig, Storage
from ..spec.moe import MoeConfig
from .chosen import chosen_product
from .compute import accumulation_dtype
from .embedding import Product
from .experts import grouped_product, sort_by_expert
from .fetching import DOWN, UP, fetched_product, fetched_slots
from .linear import linear_decode, materialized
from .mlp import inner
from .packing import Matrix
from .routing import Routing, route


class Mlp(NamedTuple):
    """The matrices of an MLP, or, with E in front of every tensor, of experts."""

    up: Matrix
    """[F, M]; where gated [2 F, M], the gate's rows first."""
    down: Matrix


class Moe(NamedTuple):
    """A prepared mixture of experts."""

    router: Matrix
    """[E, M], float32."""
    choice_bias_E: Tensor | None
    experts: Mlp
    shared: Mlp | None
    shared_gate: Matrix | None
    """[1, M], float32."""
    residual: Mlp | None
    coefficient: Matrix | None
    """[2, M], float32."""
    chosen_PK: Tensor | None = None
    """The buffer for the experts that a call's tokens choose; None where routes are not reported."""
    fetcher_1: Tensor | None = None
    """The number of what fetches the experts (`fetching`); `experts` are then slots. None where they lie in memory."""


def mlp(x_TM: Tensor, weights: Mlp, config: MlpConfig, storage: Storage, product: Product) -> Tensor:
    """Feed each token forward; returns [T, M] in x's dtype."""
    return product(inner(product(x_TM, weights.up, storage), config), weights.down, storage)


def moe(x_TM: Tensor, weights: Moe, config: MoeConfig, storage: Storage, product: Product) -> Tensor:
    """Serve each token by its experts; returns [T, M] in x's dtype. Nothing is dropped."""
    routing = routed(x_TM, weights, config, product)
    out_TM = served(x_TM, routing, weights, config, storage, product)
    shared_TM, residual_TM = beside(x_TM, weights, config, storage, product)
    return mixed(x_TM, out_TM, shared_TM, residual_TM, weights, product)


def routed(x_TM: Tensor, weights: Moe, config: MoeConfig, product: Product) -> Routing:
    """Let each token choose its experts, and note what they are where that is asked for."""
    routing = route(_wide(x_TM, weights.router, product), config.router, weights.choice_bias_E)
    if weights.chosen_PK is not None:
        weights.chosen_PK[: x_TM.shape[0]].copy_(routing.expert_TK)
    return routing


def served(
    x_TM: Tensor, routing: Routing, weights: Moe, config: MoeConfig, storage: Storage, product: Product
) -> Tensor:
    """Return what the chosen experts make of each token, [T, M] in x's dtype."""
    serve = _few if product is linear_decode else _many
    return serve(x_TM, routing, weights, config, storage).to(x_TM.dtype)


def beside(
    x_TM: Tensor, weights: Moe, config: MoeConfig, storage: Storage, product: Product
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the shared MLP and the residual one make of each token, [T, M]; None for one that is not there."""
    shared_TM = residual_TM = None
    if config.shared is not None and weights.shared is not None:
        shared_TM = mlp(x_TM, weights.shared, config.shared, storage, product)
    if config.residual is not None and weights.residual is not None:
        residual_TM = mlp(x_TM, weights.residual, config.residual, storage, product)
    return shared_TM, residual_TM


def mixed(
    x_TM: Tensor, out_TM: Tensor, shared_TM: Tensor | None, residual_TM: Tensor | None, weights: Moe, product: Product
) -> Tensor:
    """Return what experts and the MLPs beside them made of x, added up or mixed; [T, M]."""
    if shared_TM is not None:
        if weights.shared_gate is not None:
            shared_TM = torch.sigmoid(_wide(x_TM, weights.shared_gate, product)).to(x_TM.dtype) * shared_TM
        out_TM = out_TM + shared_TM
    if residual_TM is not None and weights.coefficient is not None:
        mix_T2 = torch.softmax(_wide(x_TM, weights.coefficient, product), -1).to(x_TM.dtype)
        out_TM = mix_T2[:, :1] * out_TM + mix_T2[:, 1:] * residual_TM
    return out_TM


def _few(x_TM: Tensor, routing: Routing, weights: Moe, config: MoeConfig, storage: Storage) -> Tensor:
    """Return the weighted sums [T, M] in the weights' dtype, by words that are read where they lie."""
    expert_TK, experts = routing.expert_TK, weights.experts
    if weights.fetcher_1 is not None:
        expert_TK = fetched_slots(expert_TK, x_TM, weights.fetcher_1)
    expert_A = expert_TK.flatten()
    x_AM = x_TM[:, None].expand(-1, config.router.top_k, -1).flatten(0, 1).contiguous()
    out_AM = one_by_one(x_AM, expert_A, experts, config.expert, storage)
    return weighted(out_AM.view(x_TM.shape[0], -1, x_TM.shape[1]), routing.weight_TK)


def one_by_one(x_AM: Tensor, expert_A: Tensor, experts: Mlp, config: MlpConfig, storage: Storage) -> Tensor:
    """Feed each row through its own expert, [A, M] in x's dtype, by words that are read where they lie."""
    inner_AF = inner(chosen_product(x_AM, expert_A, experts.up, storage), config)
    return chosen_product(inner_AF, expert_A, experts.down, storage)


def _many(x_TM: Tensor, routing: Routing, weights: Moe, config: MoeConfig, storage: Storage) -> Tensor:
    """Return the same by one product for each expert that any token chose."""
    order = sort_by_expert(routing.expert_TK, config.router.experts)

    def product(x_AI: Tensor, matrix: Matrix, part: int) -> Tensor:
        if weights.fetcher_1 is None:
            return grouped_product(x_AI, order.rows_E, matrix, storage)
        return fetched_product(x_AI, order.rows_E, weights.fetcher_1, part, matrix.outputs, storage)

    x_AM = x_TM[order.choice_A // config.router.top_k]
    inner_AF = inner(product(x_AM, weights.experts.up, UP), config.expert)
    out_AM = product(inner_AF, weights.experts.down, DOWN)
    return weighted(out_AM[order.place_A.view_as(routing.expert_TK)], routing.weight_TK)


def weighted(out_TKM: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the weighted sum over a token's experts, in the weights' dtype."""
    weight_TK = materialized(weight_TK.contiguous())  # divided once, not once a vector
    return (out_TKM.to(weight_TK.dtype) * weight_TK[:, :, None]).sum(1)


def _wide(x_TM: Tensor, weights: Matrix, product: Product) -> Tensor:
    return product(x_TM.to(accumulation_dtype(x_TM.dtype)), weights, Storage.FLOAT32)
