"""Routing: which experts serve a token, and how much each of them counts.

    logit[t] = router(x[t])                             float32 or wider, through the choice and the weights
    score[t] = softmax(logit[t]),  sigmoid(logit[t]),  or logit[t] where the softmax comes after the choice
               (over the chosen; SparseMixer: for each choice over those near it)
    chosen[t] = the k largest of score[t] (+ choice bias), the lower index of equal ones first
    weight[t] = scale * score[t] of the chosen, divided by their sum where the recipe renormalizes

Public models differ in each of these lines (`spec.moe.ROUTERS`). Nothing is random at inference: no jitter, no
sampled second expert. Paper, section V-C; Fedus et al. 2021 (top-1), Lepikhin et al. 2020 (top-2); sigmoid scores, bias
for the choice and groups: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.

Shapes: T tokens, E experts, K = top_k, M hidden, G groups.
"""

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from ..spec.errors import NumericsError
from ..spec.moe import RouterConfig, Score

_TINY = 1e-20
"""Added to the sum that divides a token's weights, as DeepSeek-V3 does: sigmoids may all underflow."""


class Routing(NamedTuple):
    """What each token chose, its best expert first."""

    expert_TK: Tensor
    """int64."""
    weight_TK: Tensor
    """float32 or wider."""


def route(logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None = None) -> Routing:
    """Choose k experts for each token, and weigh them.

    Two tokens, three experts; the second token's first two logits are equal, so the lower index goes first:

        >>> logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]).log()
        >>> route(logits, RouterConfig(experts=3, top_k=2, renormalize=True))
        Routing(expert_TK=tensor([[1, 2],
                [0, 1]]), weight_TK=tensor([[0.6667, 0.3333],
                [0.5000, 0.5000]]))

    Raises `NumericsError` for a logit that is NaN, with its token and expert.
    """
    logit_TE = logit_TE.to(torch.promote_types(logit_TE.dtype, torch.float32))
    if logit_TE.isnan().any():
        token, expert = logit_TE.isnan().nonzero()[0].tolist()
        raise NumericsError(f"the router's logit of token {token} for expert {expert} is NaN; check the weights")
    score_TE = _scores(logit_TE, config.score)
    ranking_TE = score_TE if choice_bias_E is None else score_TE + choice_bias_E.to(score_TE.dtype)
    expert_TK = _largest(_within_kept_groups(ranking_TE, config), config.top_k)
    return Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))


def choice_weights(logit_TE: Tensor, expert_TK: Tensor, config: RouterConfig) -> Tensor:
    """Return how much each of the chosen experts counts, [T, K], whoever chose them."""
    weight_TK = _scores(logit_TE, config.score).gather(1, expert_TK)
    if config.score is Score.SOFTMAX_OF_CHOSEN:
        weight_TK = torch.softmax(weight_TK, -1)
    if config.score is Score.SPARSEMIXER and config.nearness is not None:
        weight_TK = _among_near(logit_TE, expert_TK, config.nearness)
    if config.renormalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + _TINY)
    return config.scale * weight_TK


def _among_near(logit_TE: Tensor, expert_TK: Tensor, nearness: float) -> Tensor:
    """Weigh each choice among the experts not chosen before it whose logit is near its own (SparseMixer)."""
    weights, left_TE = [], logit_TE
    for chosen_T1 in expert_TK.T[..., None]:
        best_T1 = logit_TE.gather(1, chosen_T1)
        far_TE = best_T1 - logit_TE > nearness * torch.maximum(logit_TE.abs(), best_T1)
        weights.append(torch.softmax(left_TE.masked_fill(far_TE, -torch.inf), -1).gather(1, chosen_T1))
        left_TE = left_TE.scatter(1, chosen_T1, -torch.inf)
    return torch.cat(weights, -1)


def _scores(logit_TE: Tensor, kind: Score) -> Tensor:
    match kind:
        case Score.SOFTMAX:
            return torch.softmax(logit_TE, -1)
        case Score.SIGMOID:
            return torch.sigmoid(logit_TE)
        case Score.SOFTMAX_OF_CHOSEN | Score.SPARSEMIXER:
            return logit_TE


def _within_kept_groups(ranking_TE: Tensor, config: RouterConfig) -> Tensor:
    """The ranking with -inf for every expert of a group that the token may not choose from."""
    if config.kept_groups == config.groups:
        return ranking_TE
    ranking_TGE = rearrange(ranking_TE, "t (g e) -> t g e", g=config.groups)
    best_two = min(2, ranking_TGE.shape[-1])
    group_score_TG = reduce(ranking_TGE.topk(best_two, -1).values, "t g two -> t g", "sum")
    kept_TG = torch.zeros_like(group_score_TG, dtype=torch.bool)
    kept_TG.scatter_(1, _largest(group_score_TG, config.kept_groups), True)
    return rearrange(ranking_TGE.masked_fill(~kept_TG[..., None], -torch.inf), "t g e -> t (g e)")


def _largest(value: Tensor, count: int) -> Tensor:
    """Indices of the largest along the last axis, falling; a stable sort puts the lower index of equal ones first."""
    return torch.sort(value, dim=-1, descending=True, stable=True).indices[..., :count]
