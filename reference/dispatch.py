"""Dispatch and combine: tokens to the experts' slots and back, with a capacity.

Every expert has C slots. A choice that finds no slot is dropped: it adds nothing, and the token passes by the residual
only. The paper contrasts two forms of the same computation (section V-C):

    one-hot   a [T, E, C] mask and two einsums, "t e c, t m -> e c m" and "t e c, e c m -> t m": T * E * C * M
              multiplications, of which all but T * k * M are with zeros (Lepikhin et al. 2020)
    tables    token -> slot and slot -> token as integers, and two copies of rows: T * k * M

With four tokens, two experts, top-1 and a capacity of 2:

    expert of token   0 0 1 0       slot of token    0 1 2 dropped        (expert * C + place within the expert)
    token of slot     0 1 2 empty

Shapes: T tokens, K = top_k, E experts, C capacity, M hidden.
"""

import math

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional

from ..spec.moe import CapacityConfig, DropOrder
from .routing import Routing

DROPPED = -1
"""The slot of a choice that was dropped, and the token of a slot that is empty."""


def capacity(tokens: int, experts: int, top_k: int, config: CapacityConfig | None) -> int:
    """Return how many tokens an expert serves: max(ceil(factor * T * k / E), minimum), at most T.

    Without a config it is T, and nothing is ever dropped.

    >>> capacity(10, 4, 2, CapacityConfig(factor=1.25)), capacity(10, 4, 2, None)
    (7, 10)
    """
    if config is None:
        return tokens
    return min(tokens, max(math.ceil(config.factor * tokens * top_k / experts), config.minimum))


def slots(routing: Routing, experts: int, places: int, order: DropOrder = DropOrder.FIRST_COME) -> Tensor:
    """Return the slot of each choice, int64 [T, K], or `DROPPED`; `places` is the capacity C.

    An expert's places are given out first come, first served: all first choices by token, then all second choices.
    Where the highest scores are kept, those choices alone come.

    >>> routing = Routing(torch.tensor([[0], [0], [1], [0]]), torch.tensor([[0.5], [0.6], [0.9], [0.7]]))
    >>> slots(routing, 2, 2).flatten().tolist()
    [0, 1, 2, -1]
    >>> slots(routing, 2, 2, DropOrder.HIGHEST_SCORE).flatten().tolist()
    [-1, 0, 2, 1]
    """
    tokens = len(routing.expert_TK)
    expert_A = rearrange(routing.expert_TK, "t k -> (k t)")  # attempts, in the order in which they are served
    chosen_AE = functional.one_hot(expert_A, experts)
    if order is DropOrder.HIGHEST_SCORE:
        weight_A = rearrange(routing.weight_TK, "t k -> (k t)")
        rank_A = torch.argsort(weight_A, descending=True, stable=True).argsort()
        falling_AE = chosen_AE[rank_A.argsort()]
        place_AE = (falling_AE.cumsum(0) - 1)[rank_A]
        chosen_AE = chosen_AE * (place_AE < places)
    place_A = ((chosen_AE.cumsum(0) - 1) * chosen_AE).sum(-1)
    served_A = (place_A < places) & chosen_AE.any(-1)
    slot_A = torch.where(served_A, expert_A * places + place_A, DROPPED)
    return rearrange(slot_A, "(k t) -> t k", t=tokens)


def tokens_of_slots(slot_TK: Tensor, experts: int, places: int) -> Tensor:
    """Return the inverse table: which token each slot serves, int64 [E * C], or `DROPPED` where it is empty.

    >>> tokens_of_slots(torch.tensor([[0], [1], [2], [-1]]), 2, 2).tolist()
    [0, 1, 2, -1]
    """
    token_TK = repeat(torch.arange(len(slot_TK), device=slot_TK.device), "t -> t k", k=slot_TK.shape[1])
    table = torch.full((experts * places + 1,), DROPPED, device=slot_TK.device)  # one more, for what is dropped
    return table.index_put_((slot_TK.flatten(),), token_TK.flatten())[:-1].clone()


def dispatch(x_TM: Tensor, slot_TK: Tensor, experts: int, places: int) -> Tensor:
    """Copy each token into its slots by the table; returns [E, C, M], zeros where a slot is empty."""
    token_S = tokens_of_slots(slot_TK, experts, places)
    x_SM = torch.where((token_S != DROPPED)[:, None], x_TM[token_S.clamp_min(0)], 0)
    return rearrange(x_SM, "(e c) m -> e c m", e=experts)


def combine(out_ECM: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Add up what the experts made of each token, times its weights; returns [T, M] in the weights' dtype.

    What was dropped adds nothing, not even where a slot that it does not have holds a NaN.
    """
    out_SM = rearrange(out_ECM, "e c m -> (e c) m").to(weight_TK.dtype)
    out_TKM = torch.where((slot_TK != DROPPED)[..., None], out_SM[slot_TK.clamp_min(0)], 0)
    return einsum(weight_TK, out_TKM, "t k, t k m -> t m")


def slot_mask(slot_TK: Tensor, experts: int, places: int) -> Tensor:
    """Return the one-hot form of the table: 1 where choice k of token t has a slot, int64 [T, K, E, C]."""
    one_hot_TKS = functional.one_hot(slot_TK + 1, experts * places + 1)[..., 1:]  # what is dropped has index 0
    return rearrange(one_hot_TKS, "t k (e c) -> t k e c", e=experts)


def dispatch_one_hot(x_TM: Tensor, mask_TKEC: Tensor) -> Tensor:
    """Do as `dispatch`, by an einsum over all tokens and slots."""
    return einsum(mask_TKEC.to(x_TM.dtype), x_TM, "t k e c, t m -> e c m")


def combine_one_hot(out_ECM: Tensor, mask_TKEC: Tensor, weight_TK: Tensor) -> Tensor:
    """Do as `combine`, by an einsum over all tokens and slots."""
    mask_TEC = einsum(mask_TKEC.to(weight_TK.dtype), weight_TK, "t k e c, t k -> t e c")
    return einsum(mask_TEC, out_ECM.to(weight_TK.dtype), "t e c, e c m -> t m")
