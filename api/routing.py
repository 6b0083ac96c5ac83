"""Which experts a prompt's tokens choose, as the reference routes them.

Shapes: T tokens, E experts, K = top_k, L layers with experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twinfer.reference.components import DEFAULT
from twinfer.reference.dispatch import DROPPED, capacity, slots
from twinfer.reference.path import ReferencePath
from twinfer.reference.routing import Routing, route
from twinfer.spec.config import Storage
from twinfer.spec.decoder import check_extensible, checked_tokens
from twinfer.spec.errors import RequestError
from twinfer.spec.moe import CapacityConfig, MoeConfig, RouterConfig, Score
from twinfer.spec.weights import WeightSource


@dataclass(frozen=True, slots=True)
class LayerRoutes:
    """The choices of one layer's router for all tokens."""

    layer: int
    tokens: list[int]
    """Tokens of each expert; they add up to T * K."""
    imbalance: float
    """Tokens of the expert with the most over the mean: 1 where all serve as many, E / K where all choose the same."""
    dropped: float | None
    """The part of all choices that finds no slot; None without a capacity."""
    closest: float | None
    """The smallest gap, over tokens, between a chosen expert's score and the best that was not; None where k = E."""
    closest_token: int | None


def routes(
    source: WeightSource,
    prompts: Sequence[Sequence[int]],
    capacity_config: CapacityConfig | None = None,
    storage: Storage = Storage.FLOAT32,
) -> list[LayerRoutes]:
    """Run the prompts through the reference in float32, and report what its routers chose.

    Each prompt's choices compete for the slots of its own call. Raises `RequestError` for a model without experts.
    """
    mixtures = [(index, layer.mlp) for index, layer in enumerate(source.config.layers)]
    with_experts = [(index, mlp) for index, mlp in mixtures if isinstance(mlp, MoeConfig)]
    if not with_experts:
        raise RequestError(f"this {source.config.family} model has no experts, so it routes nothing")
    tokens = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    check_extensible(source.config)
    checked_tokens(source.config, [0] * len(tokens), tokens)
    seen: list[tuple[Routing, Tensor]] = []

    def recording(logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Routing:
        routing = route(logit_TE, config, choice_bias_E)
        seen.append((routing, gaps(logit_TE, routing, config, choice_bias_E)))
        return routing

    path = ReferencePath(source, storage=storage, components=replace(DEFAULT, route=recording))
    sequences = path.open(len(prompts), max(map(len, prompts)))
    path.extend(sequences, tokens)
    count = len(with_experts)
    return [
        _of_layer(index, mlp.router, [seen[call] for call in range(place, len(seen), count)], capacity_config)
        for place, (index, mlp) in enumerate(with_experts)
    ]


def gaps(logit_TE: Tensor, routing: Routing, config: RouterConfig, choice_bias_E: Tensor | None) -> Tensor:
    """Return by how much each token's last choice beat the best expert left, [T]; infinite where none is left.

    Between what the router compares: logits, or sigmoids or softmaxes plus their bias. With groups, an expert counts as
    left in those groups only from which the token chose.

    >>> logits = torch.tensor([[3.0, 1.0, 2.5]])
    >>> config = RouterConfig(experts=3, top_k=1, score=Score.SOFTMAX_OF_CHOSEN)
    >>> gaps(logits, route(logits, config), config, None).tolist()
    [0.5]
    """
    ranking_TE = logit_TE
    if config.score is Score.SOFTMAX:
        ranking_TE = torch.softmax(logit_TE, -1)
    if config.score is Score.SIGMOID:
        ranking_TE = torch.sigmoid(logit_TE)
    if choice_bias_E is not None:
        ranking_TE = ranking_TE + choice_bias_E
    size = config.experts // config.groups
    chosen_TE = torch.zeros_like(ranking_TE, dtype=torch.bool).scatter(1, routing.expert_TK, True)
    open_TE = chosen_TE.view(-1, config.groups, size).any(-1).repeat_interleave(size, 1)
    least_T = ranking_TE.masked_fill(~chosen_TE, torch.inf).amin(-1)
    best_T = ranking_TE.masked_fill(chosen_TE | ~open_TE, -torch.inf).amax(-1)
    return least_T - best_T


def _of_layer(
    index: int, router: RouterConfig, calls: list[tuple[Routing, Tensor]], limit: CapacityConfig | None
) -> LayerRoutes:
    expert_A = torch.cat([routing.expert_TK.flatten() for routing, _ in calls])
    count_E = torch.bincount(expert_A, minlength=router.experts)
    dropped = None
    if limit is not None:
        lost = 0
        for routing, _ in calls:
            places = capacity(len(routing.expert_TK), router.experts, router.top_k, limit)
            lost += int((slots(routing, router.experts, places, limit.drop_order) == DROPPED).sum())
        dropped = lost / len(expert_A)
    gap_T = torch.cat([gap_T for _, gap_T in calls])
    token = int(gap_T.argmin())
    closest = float(gap_T[token])
    known = closest != float("inf")
    return LayerRoutes(
        layer=index,
        tokens=count_E.tolist(),
        imbalance=float(count_E.max() / (count_E.sum() / router.experts)),
        dropped=dropped,
        closest=closest if known else None,
        closest_token=token if known else None,
    )
