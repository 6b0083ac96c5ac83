"""Dispatch and combine with a capacity, by tables or by one-hot einsums: the two forms that the paper contrasts.

Why tables are faster: they copy T * k rows, where the einsums multiply each token with each slot, T * E * C * M times,
nearly always by zero. Places, which both forms share, are given out by comparing each attempt with each where they are
few, and by a stable sort where they are many: a running sum over one-hot choices [A, E] took 119 instead of 30
microseconds for 128 attempts, and 20 instead of 0.7 milliseconds for 8192.
What it relies on: the capacity C follows from the number of tokens, so that a graph is made for one number.

With four tokens, two experts, top-1 and a capacity of 2:

    expert of token   0 0 1 0       slot of token    0 1 2 dropped        (expert * C + place within the expert)
    token of slot     0 1 2 empty

Shapes: T tokens, K = top_k, A = T * K attempts, E experts, C capacity, S = E * C slots, M hidden.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.moe import DropOrder
from .linear import materialized
from .routing import Routing

DROPPED = -1
"""The slot of a choice that was dropped, and the token of a slot that is empty."""

_FEW_ATTEMPTS = 256
"""Attempts up to which comparing each with each takes no longer than sorting them."""

Experts = Callable[[Tensor], Tensor]
"""The outputs of the experts for the tokens in their slots, [E, C, M]."""


def slots_of(routing: Routing, experts: int, places: int, order: DropOrder = DropOrder.FIRST_COME) -> Tensor:
    """Return the slot of each choice, int64 [T, K], or `DROPPED`; `places` is the capacity C.

    All first choices are served in the order of the tokens, then all second choices, and so on; where the highest
    scores are kept, only those come.
    """
    expert_A = routing.expert_TK.t().flatten()
    serving_A = None
    if order is DropOrder.HIGHEST_SCORE:
        serving_A = torch.sort(routing.weight_TK.t().flatten(), descending=True, stable=True).indices
    place_A = _places(expert_A if serving_A is None else expert_A[serving_A], experts)
    if serving_A is not None:
        kept_A = torch.empty_like(place_A).scatter_(0, serving_A, place_A) < places
        place_A = _places(torch.where(kept_A, expert_A, experts), experts + 1)
        place_A = torch.where(kept_A, place_A, places)
    slot_A = torch.where(place_A < places, expert_A * places + place_A, DROPPED)
    return slot_A.view(routing.expert_TK.shape[1], -1).t()


def _places(expert_A: Tensor, experts: int) -> Tensor:
    """Return how many earlier attempts chose the same expert."""
    place_A = torch.arange(len(expert_A), device=expert_A.device)
    if len(expert_A) <= _FEW_ATTEMPTS:
        expert_A, number_A = expert_A.to(torch.int32), place_A.to(torch.int32)
        return ((expert_A[:, None] == expert_A) & (number_A[:, None] > number_A)).sum(1)
    sorted_A, attempt_A = torch.sort(expert_A, stable=True)
    first_E = torch.searchsorted(sorted_A, torch.arange(experts, device=expert_A.device))
    return torch.empty_like(place_A).scatter_(0, attempt_A, place_A - first_E[sorted_A])


def tokens_of_slots(slot_TK: Tensor, experts: int, places: int) -> Tensor:
    """Return which token each slot serves, int64 [S], or `DROPPED` where it is empty."""
    tokens, top_k = slot_TK.shape
    token_TK = torch.arange(tokens, device=slot_TK.device)[:, None].expand(-1, top_k)
    size = experts * places
    table = torch.full((size + 1,), DROPPED, device=slot_TK.device)  # one more, for what is dropped
    return table.scatter_(0, torch.where(slot_TK == DROPPED, size, slot_TK).flatten(), token_TK.flatten())[:size]


def dispatch(x_TM: Tensor, slot_TK: Tensor, experts: int, places: int) -> Tensor:
    """Copy each token into its slots; returns [E, C, M], zeros where a slot is empty."""
    token_S = tokens_of_slots(slot_TK, experts, places)
    x_SM = torch.where((token_S != DROPPED)[:, None], x_TM[token_S.clamp_min(0)], 0)
    return x_SM.view(experts, places, -1)


def combine(out_ECM: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Add up what the experts made of each token, times its weights; returns [T, M] in the weights' dtype."""
    slot_TK, weight_TK = (materialized(each.contiguous()) for each in (slot_TK, weight_TK))  # once, not once a vector
    out_TKM = out_ECM.flatten(0, 1)[slot_TK.clamp_min(0)].to(weight_TK.dtype)
    return torch.where((slot_TK != DROPPED)[..., None], out_TKM * weight_TK[..., None], 0).sum(1)


def table_form(
    x_TM: Tensor, routing: Routing, experts: int, places: int, serve: Experts, order: DropOrder = DropOrder.FIRST_COME
) -> Tensor:
    """Dispatch by the tables, serve, combine by the tables; returns [T, M]."""
    slot_TK = slots_of(routing, experts, places, order)
    return combine(serve(dispatch(x_TM, slot_TK, experts, places)), slot_TK, routing.weight_TK)


def one_hot_form(
    x_TM: Tensor, routing: Routing, experts: int, places: int, serve: Experts, order: DropOrder = DropOrder.FIRST_COME
) -> Tensor:
    """Do the same by two einsums over a [T, S] mask."""
    slot_TK = slots_of(routing, experts, places, order)
    mask_TKS = slot_TK[..., None] == torch.arange(experts * places, device=slot_TK.device)
    x_SM = torch.einsum("ts,tm->sm", mask_TKS.any(1).to(x_TM.dtype), x_TM)
    out_SM = serve(x_SM.view(experts, places, -1)).flatten(0, 1)
    mask_TS = (mask_TKS * routing.weight_TK[..., None]).sum(1)
    return torch.einsum("ts,sm->tm", mask_TS, out_SM.to(mask_TS.dtype))
