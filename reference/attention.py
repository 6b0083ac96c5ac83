"""Scaled dot-product attention over grouped heads.

    out[b,t,h] = sum_s softmax_s(score[b,t,h,s]) * value[b,s,g],   g = h // (H // K)
    score[b,t,h,s] = cap(scale * <query[b,t,h], key[b,s,g]>) + bias[h,t,s]

where s runs over the keys that query t may see, and cap(z) = softcap * tanh(z / softcap) in models that bend their
scores (Gemma 2). The bias is ALiBi's, if there is any. A head with a sink has one more score, of no key: it takes its
share of the softmax and adds nothing (gpt-oss; Xiao et al. 2023).
Vaswani et al. 2017 eq. 1; grouped heads: Ainslie et al. 2023.
The paper computes all of this in one fused region (section III-D, Fig. 1c).

Shapes: B batch, T query tokens, S key tokens, H query heads, K key/value heads, G = H/K, D head size.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor


def visible(
    query_position_T: Tensor,
    key_position_S: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    key_length: int | None = None,
) -> Tensor:
    """Which keys each query may see, as a boolean [T, S].

    Positions count tokens from the start of the sequence, so a query that follows a cache of S - T tokens is simply
    given positions S - T .. S - 1 (bottom-right alignment needs no special case). A window of W keys is the token
    itself and the W - 1 before it; what comes after is `causal`'s matter. Keys at or past `key_length` are padding.

        >>> visible(torch.tensor([2, 3]), torch.arange(4), window=2).int().tolist()
        [[0, 1, 1, 0], [0, 0, 1, 1]]
    """
    distance_TS = query_position_T[:, None] - key_position_S[None, :]
    seen_TS = torch.ones_like(distance_TS, dtype=torch.bool)
    if causal:
        seen_TS = seen_TS & (distance_TS >= 0)
    if window is not None:
        seen_TS = seen_TS & (distance_TS < window)
    if key_length is not None:
        seen_TS = seen_TS & (key_position_S < key_length)
    return seen_TS


def attention(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    visible_TS: Tensor,
    scale: float,
    bias_HTS: Tensor | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Attend every query to the keys it may see; returns [B, T, H, D] in the queries' dtype.

    `visible_TS` is a boolean [T, S], or [B, T, S] where sequences differ (in their lengths, say).

    A query that may see no key gets zeros: a softmax over nothing has no value, and padding must not invent one.
    Keys and values that no query may see do not matter, not even when they are NaN.
    """
    wide = torch.promote_types(query_BTHD.dtype, torch.float32)
    seen_BTS = visible_TS.expand(len(query_BTHD), -1, -1)
    seen_by_any_BS11 = seen_BTS.any(1)[:, :, None, None]
    key_BSKD = key_BSKD.to(wide).where(seen_by_any_BS11, 0.0)  # what is never seen may hold anything; 0 * NaN is NaN
    value_BSKD = value_BSKD.to(wide).where(seen_by_any_BS11, 0.0)
    query_BTKGD = rearrange(query_BTHD.to(wide), "b t (k g) d -> b t k g d", k=key_BSKD.shape[2])

    score_BKGTS = scale * einsum(query_BTKGD, key_BSKD, "b t k g d, b s k d -> b k g t s")
    if softcap is not None:
        score_BKGTS = softcap * torch.tanh(score_BKGTS / softcap)
    if bias_HTS is not None:
        score_BKGTS = score_BKGTS + rearrange(bias_HTS.to(wide), "(k g) t s -> k g t s", k=key_BSKD.shape[2])
    sink_KG11 = None if sink_H is None else rearrange(sink_H.to(wide), "(k g) -> k g 1 1", k=key_BSKD.shape[2])
    weight_BKGTS = _softmax_over(score_BKGTS, seen_BTS[:, None, None], sink_KG11)
    out_BTKGD = einsum(weight_BKGTS, value_BSKD, "b k g t s, b s k d -> b t k g d")
    return rearrange(out_BTKGD, "b t k g d -> b t (k g) d").to(query_BTHD.dtype)


def _softmax_over(score: Tensor, seen: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax along the last axis over the entries marked in `seen`, and the sink; all zeros where none is marked."""
    score = score.masked_fill(~seen, -torch.inf)
    peak = score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)  # a row of -inf has no peak; any finite one will do
    if sink is not None:
        peak = torch.maximum(peak, sink)
    weight = torch.exp(score - peak)
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    return weight / total.clamp_min(torch.finfo(score.dtype).tiny)
