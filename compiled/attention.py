"""Attention over the static cache, and the cache's writing.

Why it is faster: keys and values stay where they were written; a decode step reads them in place, and only as many
slots as the longest of its sequences has, whatever the capacity. What it relies on: one tensor for K and one for V a
layer, [slots, K, D], in which sequence b with capacity C owns the slots b * C .. b * C + C - 1, position p at slot
b * C + p. So neither batch nor capacity is a dimension, and no size of them is special to a graph:

    capacity 8, sequence 2 at position 5: start 16, slot 21

Slots past a sequence's length are never read into a result, whatever they hold: decoding masks the score and the value
alike (0 * NaN would be NaN), prefill reads exactly the slots that are written.

Shapes: R sequences that gain one token, T query tokens of one sequence, S key positions (0 .. S - 1), H heads, K
key/value heads, G = H / K, D head size, C capacity.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .linear import settled


def write(cache_SKD: Tensor, slot_R: Tensor, new_RKD: Tensor) -> None:
    """Put each new row into its slot, in place.

    >>> cache = torch.zeros(6, 1, 1)  # two sequences of capacity 3
    >>> write(cache, torch.tensor([0 * 3 + 2, 1 * 3 + 0]), torch.tensor([[[7.0]], [[8.0]]]))
    >>> cache.flatten().tolist()
    [0.0, 0.0, 7.0, 8.0, 0.0, 0.0]
    """
    cache_SKD.index_put_((slot_R,), new_RKD)


def attend_decode(
    query_RHD: Tensor,
    key_CKD: Tensor,
    value_CKD: Tensor,
    *,
    start_R: Tensor,
    position_R: Tensor,
    slot_S: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query for each of R sequences, at `position_R`, over its slots start .. start + position; [R, H, D].

    `slot_S` is 0 .. S - 1 with S above every position; unseen slots among them change nothing.
    """
    kv_heads = key_CKD.shape[1]
    query_RKGD = (query_RHD * scale).view(query_RHD.shape[0], kv_heads, -1, query_RHD.shape[2])
    slot_RS = start_R[:, None] + slot_S[None, :]
    seen_RS = _seen(position_R, slot_S, window)
    key_RSKD, value_RSKD = key_CKD[slot_RS], value_CKD[slot_RS]

    score_RSKG = (query_RKGD[:, None] * key_RSKD[:, :, :, None, :]).sum(-1)
    score_RSKG = torch.where(seen_RS[:, :, None, None], score_RSKG, -torch.inf)
    weight_RSKG = torch.exp(score_RSKG - score_RSKG.amax(1, keepdim=True))
    weight_RSKG = weight_RSKG / weight_RSKG.sum(1, keepdim=True)
    value_RSKD = torch.where(seen_RS[:, :, None, None], value_RSKD, 0.0)
    out_RKGD = (weight_RSKG[..., None] * value_RSKD[:, :, :, None, :]).sum(1)
    return out_RKGD.reshape(query_RHD.shape)


def attend_prefill(
    query_THD: Tensor, key_CKD: Tensor, value_CKD: Tensor, *, slot_S: Tensor, mask_TS: Tensor, scale: float
) -> Tensor:
    """T queries of one sequence over its S slots, all of them written; `mask_TS` from `mask`; [T, H, D].

    Keys and values are repeated for the query heads that share them, in the same pass that reads their slots.
    """
    group = query_THD.shape[1] // key_CKD.shape[1]
    key_SHD = settled(key_CKD[slot_S].repeat_interleave(group, 1))
    value_SHD = settled(value_CKD[slot_S].repeat_interleave(group, 1))
    out_1HTD = functional.scaled_dot_product_attention(
        query_THD.transpose(0, 1)[None],
        key_SHD.transpose(0, 1)[None],
        value_SHD.transpose(0, 1)[None],
        attn_mask=mask_TS[None, None],
        scale=scale,
    )
    return out_1HTD[0].transpose(0, 1)


def mask(position_T: Tensor, slot_S: Tensor, window: int | None) -> Tensor:
    """What `attend_prefill` adds to its scores: 0 where seen, -inf elsewhere, float32 [T, S]."""
    return torch.where(_seen(position_T, slot_S, window), 0.0, -torch.inf)


def _seen(position_R: Tensor, slot_S: Tensor, window: int | None) -> Tensor:
    """Itself and all before it, or itself and the window - 1 before it."""
    distance_RS = position_R[:, None] - slot_S[None, :]
    return (distance_RS >= 0) & (distance_RS < window) if window is not None else distance_RS >= 0
