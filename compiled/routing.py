"""Routing: which experts serve a token, and how much each of them counts; all in float32 or wider.

Why it is faster: the k best of E are found in k rounds of two reductions, which Inductor fuses with the scores into one
loop over the tokens; a sort of all E would be a call of its own. What it relies on: k is small. The rounds also settle
ties by themselves, to the lower index, which `torch.topk` leaves open:

    value 1 3 3 2    round 1: peak 3, experts 1 and 2 have it, the lower is 1
                     round 2: peak 3, expert 2

Shapes: T tokens, E experts, K = top_k, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.moe import RouterConfig, Score
from .compute import accumulation_dtype

_TINY = 1e-20
"""Added to the sum that divides a token's weights: sigmoids may all underflow."""


class Routing(NamedTuple):
    """The choices of each token, its best expert first."""

    expert_TK: Tensor
    """int64."""
    weight_TK: Tensor
    """float32 or wider."""


def route(logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None = None) -> Routing:
    """Choose k experts for each token, and weigh them.

    A token with a logit that is NaN chooses experts that exist, and its weights are all NaN, whatever it chose.
    """
    logit_TE = logit_TE.to(accumulation_dtype(logit_TE.dtype))
    score_TE = _scores(logit_TE, config.score)
    ranking_TE = score_TE if choice_bias_E is None else score_TE + choice_bias_E
    expert_TK = largest(_within_kept_groups(ranking_TE, config), config.top_k)
    weight_TK = score_TE.gather(1, expert_TK)
    if config.score is Score.SOFTMAX_OF_CHOSEN:
        weight_TK = torch.softmax(weight_TK, -1)
    if config.score is Score.SPARSEMIXER and config.nearness is not None:
        weight_TK = _among_near(logit_TE, expert_TK, config.nearness)
    if config.renormalize:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + _TINY)
    weight_TK = torch.where(logit_TE.isnan().any(-1, keepdim=True), torch.nan, weight_TK)
    return Routing(expert_TK, weight_TK if config.scale == 1.0 else weight_TK * config.scale)


def largest(value_TE: Tensor, count: int) -> Tensor:
    """Return the indices of the largest along the last axis, falling, the lower of equal ones first.

    >>> largest(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3).tolist()
    [[1, 2, 3]]
    """
    # 32 bits, of which a vector holds as many as of the values
    index_E = torch.arange(value_TE.shape[-1], dtype=torch.int32, device=value_TE.device)
    left_TE = torch.ones_like(value_TE, dtype=torch.bool)
    found = []
    for _ in range(count):
        peak_T1 = torch.where(left_TE, value_TE, -torch.inf).amax(-1, keepdim=True)
        has_peak_TE = left_TE & (value_TE == peak_T1)
        # where no value equals the peak, the peak is NaN
        first_T1 = torch.where(has_peak_TE, index_E, len(index_E) - 1).amin(-1, keepdim=True)
        left_TE = left_TE & (index_E != first_T1)
        found.append(first_T1)
    return torch.cat(found, -1).to(torch.int64)


def _scores(logit_TE: Tensor, kind: Score) -> Tensor:
    match kind:
        case Score.SOFTMAX:
            return torch.softmax(logit_TE, -1)
        case Score.SIGMOID:
            return torch.sigmoid(logit_TE)
        case Score.SOFTMAX_OF_CHOSEN | Score.SPARSEMIXER:
            return logit_TE


def _within_kept_groups(ranking_TE: Tensor, config: RouterConfig) -> Tensor:
    """Return the ranking with -inf for every expert of a group that the token may not choose from."""
    if config.kept_groups == config.groups:
        return ranking_TE
    ranking_TGE = ranking_TE.view(len(ranking_TE), config.groups, -1)
    best_TG2 = ranking_TGE.gather(-1, largest(ranking_TGE, min(2, ranking_TGE.shape[-1])))
    kept_TK = largest(best_TG2.sum(-1), config.kept_groups)
    group_G = torch.arange(config.groups, device=ranking_TE.device)
    kept_TG = (kept_TK[:, :, None] == group_G).any(1)
    return torch.where(kept_TG[..., None], ranking_TGE, -torch.inf).flatten(-2)


def _among_near(logit_TE: Tensor, expert_TK: Tensor, nearness: float) -> Tensor:
    """Weigh each choice among the experts not chosen before it whose logit is near its own (SparseMixer)."""
    index_E = torch.arange(logit_TE.shape[-1], device=logit_TE.device)
    weights, left_TE = [], logit_TE
    for chosen_T1 in expert_TK[..., None].unbind(1):
        best_T1 = logit_TE.gather(1, chosen_T1)
        far_TE = best_T1 - logit_TE > nearness * torch.maximum(logit_TE.abs(), best_T1)
        near_TE = torch.softmax(torch.where(far_TE, -torch.inf, left_TE), -1)
        weights.append(near_TE.gather(1, chosen_T1))
        left_TE = torch.where(index_E == chosen_T1, -torch.inf, left_TE)
    return torch.cat(weights, -1)
