"""Attention over the static cache, and the cache's writing.

Why it is faster: keys and values stay where they were written; a decode step reads them in place, and only as many
slots as the longest of its sequences has, whatever the capacity. What it relies on: one tensor for K and one for V a
layer, [slots, K, D], in which sequence b with capacity C owns the slots b * C .. b * C + C - 1, position p at slot
b * C + p. So neither batch nor capacity is a dimension, and no size of them is special to a graph:

    capacity 8, sequence 2 at position 5: start 16, slot 21

Prefill goes block by block of its queries, each over no more keys than its last one may see: half the work of all keys
for all queries. It is an operator of its own because the number of blocks follows the prompt's length, which a graph of
any length cannot unroll.

Texts that are encoded need no cache. They stand one after the other, each attended by itself: nothing is padded, and no
score is computed that counts for nothing. Text n of N is rows bound[n] .. bound[n + 1] - 1:

    texts of 3, 1 and 4 tokens: bound 0 3 4 8

Slots past a sequence's length are never read, whatever they hold (0 * NaN would be NaN): decoding reads the new token's
own slot in place of one that it may not see, and masks the score; prefill reads exactly the slots that are written.

Shapes: R sequences that gain one token, T query tokens of one sequence (or of all texts), S key positions (0 .. S - 1),
H heads, K key/value heads, G = H / K, D head size, C capacity, N texts.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .compute import accumulation_dtype
from .linear import materialized, multiplies_fast, product

_BLOCK = 320
"""The most queries of a prompt or text that are attended at once; blocks are even. Of 260 to 512 tokens 128 at a time
are 1 to 5 % slower; 512 of a longer prompt at once are a fifth slower, since half of what they compute is masked."""

_PRODUCT_ROWS = 256 if multiplies_fast(torch.empty(0)) else 2**62
"""Rows of one key head, its queries times the query heads that share it, from which oneDNN's products are as fast as
torch's fused attention: at 384 rows and 512 keys they take two thirds of its time. With AVX2 they never are: a quarter
slower at 768 rows."""

_WRITTEN_OUT = 8
"""As many query heads of one key head are written out: a graph grows with them."""

_ACCUMULATORS = 16
"""As many sums a loop keeps in registers and still has room for the rest."""

_VECTOR = 16


def write(cache_SKD: Tensor, slot_R: Tensor, new_RKD: Tensor) -> None:
    """Put each new row into its slot, in place.

    >>> cache = torch.zeros(6, 1, 1)  # two sequences of capacity 3
    >>> write(cache, torch.tensor([0 * 3 + 2, 1 * 3 + 0]), torch.tensor([[[7.0]], [[8.0]]]))
    >>> cache.flatten().tolist()
    [0.0, 0.0, 7.0, 8.0, 0.0, 0.0]
    """
    cache_SKD.index_put_((slot_R,), new_RKD)


class DecodeMask(NamedTuple):
    """What sequences that gain one token read; the same for all layers of one window."""

    read_RS: Tensor
    """Slots of the cache, int64."""
    added_RS: Tensor
    """Added to the scores: 0, or -inf where a slot stands in for one that is not seen."""


def decode_mask(
    start_R: Tensor, position_R: Tensor, slot_S: Tensor, window: int | None, *, compute: torch.dtype
) -> DecodeMask:
    """Return the mask for new tokens at `position_R`; `slot_S` is 0 .. S - 1 with S above every position.

    >>> decode_mask(torch.tensor([16]), torch.tensor([2]), torch.arange(4), window=2, compute=torch.float32)
    DecodeMask(read_RS=tensor([[18, 17, 18, 18]]), added_RS=tensor([[-inf, 0., 0., -inf]]))
    """
    seen_RS = _seen(position_R, slot_S, window)
    read_RS = start_R[:, None] + torch.where(seen_RS, slot_S[None, :], position_R[:, None])
    return DecodeMask(read_RS, torch.where(seen_RS, 0.0, -torch.inf).to(compute))


def attend_decode(
    query_RHD: Tensor,
    key_CKD: Tensor,
    value_CKD: Tensor,
    *,
    mask: DecodeMask,
    position_R: Tensor,
    slot_S: Tensor,
    scale: float,
    softcap: float | None = None,
    slope_H: Tensor | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """One query for each of R sequences, at `position_R`, over what it sees; [R, H, D].

    The few query heads that share a key head are written out one by one, and of values so are parts of a vector's
    length: each key is read once for all heads, each value once and whole.
    """
    kv_heads = key_CKD.shape[1]
    wide = accumulation_dtype(query_RHD.dtype)
    query_RKGD = query_RHD.view(query_RHD.shape[0], kv_heads, -1, query_RHD.shape[2]).to(wide)
    key_RSKD, value_RSKD = (cache_CKD[mask.read_RS].to(wide) for cache_CKD in (key_CKD, value_CKD))
    written_out = query_RKGD.shape[2] <= _WRITTEN_OUT
    if written_out:
        score_RSKG = torch.cat([(each[:, None] * key_RSKD).sum(-1, keepdim=True) for each in query_RKGD.unbind(2)], -1)
    else:
        score_RSKG = (query_RKGD[:, None] * key_RSKD[:, :, :, None]).sum(-1)
    score_RSKG = score_RSKG * scale
    if softcap is not None:
        score_RSKG = softcap * torch.tanh(score_RSKG / softcap)
    if slope_H is not None:
        score_RSKG = score_RSKG + alibi(position_R, slot_S, slope_H, compute=wide).view(score_RSKG.shape)
    score_RSKG = score_RSKG + mask.added_RS[:, :, None, None]
    # heads last, or Inductor's vectors would run over the slots, whose values are nowhere side by side
    peak_RKG = score_RSKG.amax(1)
    if sink_H is not None:
        sink_KG = sink_H.view(peak_RKG.shape[1:])
        peak_RKG = torch.maximum(peak_RKG, sink_KG)
    weight_RSKG = materialized(torch.exp(score_RSKG - peak_RKG[:, None]))
    if written_out:
        parts = value_RSKD.view(*value_RSKD.shape[:3], _parts(*query_RKGD.shape[2:]), -1).unbind(3)
        sums = [(weight_RSK[..., None] * part).sum(1) for weight_RSK in weight_RSKG.unbind(3) for part in parts]
        out_RKGD = torch.cat(sums, -1).view(query_RKGD.shape)
    else:
        out_RKGD = (weight_RSKG[..., None] * value_RSKD[:, :, :, None]).sum(1)
    total_RKG = weight_RSKG.sum(1)
    if sink_H is not None:
        total_RKG = total_RKG + torch.exp(sink_KG - peak_RKG)
    return (out_RKGD / total_RKG[..., None]).reshape(query_RHD.shape).to(query_RHD.dtype)


def _parts(group: int, head_size: int) -> int:
    """In how many equal parts of whole vectors a value is written out, beside `group` query heads.

    >>> [_parts(group, head_size) for group, head_size in ((3, 64), (8, 128), (1, 80), (1, 12))]
    [4, 2, 5, 1]
    """
    vectors = head_size // _VECTOR if head_size % _VECTOR == 0 else 1
    return max(
        parts
        for parts in range(1, vectors + 1)
        if vectors % parts == 0 and (parts * group <= _ACCUMULATORS or parts == 1)
    )


def attend_prefill(
    query_THD: Tensor,
    key_CKD: Tensor,
    value_CKD: Tensor,
    *,
    slot_S: Tensor,
    mask_TS: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    slope_H: Tensor | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """The last T queries of one sequence over its S slots, all of them written; `mask_TS` from `mask`; [T, H, D]."""
    key_KSD, value_KSD = _by_head(key_CKD[slot_S]), _by_head(value_CKD[slot_S])
    query_THD, scale = _scaled(query_THD, scale)
    query_KTGD = _by_head(query_THD.view(query_THD.shape[0], key_CKD.shape[1], -1, query_THD.shape[2]))
    operands = query_KTGD, key_KSD, value_KSD, mask_TS
    out_THD: Tensor = torch.ops.twinfer.attend_blocks(*operands, window, scale, softcap, slope_H, sink_H)
    return out_THD


def _scaled(query_THD: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return queries times scale, and what is left to scale the scores by: 16-bit queries are not rounded again."""
    is_wide = accumulation_dtype(query_THD.dtype) is query_THD.dtype
    return (query_THD * scale, 1.0) if is_wide else (query_THD, scale)


def _by_head(x_TK: Tensor) -> Tensor:
    """Key heads first, each head's rows side by side."""
    return materialized(x_TK.transpose(0, 1).contiguous())


@torch.library.custom_op("twinfer::attend_blocks", mutates_args=())
def _attend_blocks(
    query_KTGD: Tensor,
    key_KSD: Tensor,
    value_KSD: Tensor,
    mask_TS: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    slope_H: Tensor | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Attention of the last T of S positions, in blocks of queries; a block reads the keys that one of it may see.

    In two blocks, 400 queries after 100 earlier tokens: queries 200 .. 399 are positions 300 .. 499 and read the keys
    0 .. 499, or with a window of 64 the keys 237 .. 499.
    """
    kv_heads, tokens, group, size = query_KTGD.shape
    before = key_KSD.shape[1] - tokens
    out_THD = query_KTGD.new_empty(tokens, kv_heads * group, size)
    for block, seen in _blocks(tokens, before, causal=True, window=window):
        added_HTS = mask_TS[None, block, seen]
        if slope_H is not None:
            position_T, position_S = _positions(block, seen, before, slope_H.device)
            bias_TSH = alibi(position_T, position_S, slope_H, compute=query_KTGD.dtype)
            added_HTS = added_HTS + bias_TSH.permute(2, 0, 1)
        operands = query_KTGD[:, block], key_KSD[:, seen], value_KSD[:, seen], added_HTS
        _attend_block(*operands, scale, softcap, sink_H, out_THD[block])
    return out_THD


def attend_varlen(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    *,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    slope_H: Tensor | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Every query over the keys of its own text; [T, H, D]. `cu_seqlens` [N + 1] is on the CPU: its values are read."""
    query_THD, scale = _scaled(query_THD, scale)
    query_KTGD = _by_head(query_THD.view(query_THD.shape[0], key_TKD.shape[1], -1, query_THD.shape[2]))
    operands = query_KTGD, _by_head(key_TKD), _by_head(value_TKD), cu_seqlens
    out_THD: Tensor = torch.ops.twinfer.attend_varlen(*operands, causal, window, scale, softcap, slope_H, sink_H)
    return out_THD


@torch.library.custom_op("twinfer::attend_varlen", mutates_args=())
def _attend_varlen(
    query_KTGD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    slope_H: Tensor | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Text by text, each in blocks of queries as in `attend_blocks`, and masks of a block where something is masked.

    So memory grows by the longest text, not by its square, nor by that of all.
    """
    kv_heads, tokens, group, size = query_KTGD.shape
    out_THD = query_KTGD.new_empty(tokens, kv_heads * group, size)
    for begin, end in pairwise(cu_seqlens.tolist()):
        query_KtGD, key_KSD, value_KSD = (each[:, begin:end] for each in (query_KTGD, key_KTD, value_KTD))
        for block, seen in _blocks(end - begin, 0, causal=causal, window=window):
            added_HTS = None
            if causal or window is not None:  # and ALiBi is only where attention is causal
                position_T, position_S = _positions(block, seen, 0, query_KTGD.device)
                added_HTS = mask(position_T, position_S, window, causal=causal, compute=query_KTGD.dtype)[None]
                if slope_H is not None:
                    bias_TSH = alibi(position_T, position_S, slope_H, compute=query_KTGD.dtype)
                    added_HTS = added_HTS + bias_TSH.permute(2, 0, 1)
            operands = query_KtGD[:, block], key_KSD[:, seen], value_KSD[:, seen], added_HTS
            out_tHD = out_THD[begin + block.start : begin + block.stop]
            _attend_block(*operands, scale, softcap, sink_H, out_tHD)
    return out_THD


def _blocks(tokens: int, before: int, *, causal: bool, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, `tokens` in all after `before` earlier ones, each with the keys that one of it may see."""
    count = -(-tokens // _BLOCK)
    for begin, end in pairwise(tokens * each // count for each in range(count + 1)):
        block = slice(begin, end)
        first = 0 if window is None else max(0, before + block.start - window + 1)
        yield block, slice(first, before + (block.stop if causal else tokens))


def _positions(block: slice, seen: slice, before: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where a block's queries and keys stand, from 0."""
    position_T = torch.arange(before + block.start, before + block.stop, device=device)
    return position_T, torch.arange(seen.start, seen.stop, device=device)


def _attend_block(
    query_KTGD: Tensor,
    key_KSD: Tensor,
    value_KSD: Tensor,
    added_HTS: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_H: Tensor | None,
    out_THD: Tensor,
) -> None:
    """Into `out_THD`: by torch's fused attention, or with many rows a key head, or a cap, by products.

    `added_HTS` is added to the scores, for all heads or for each. The products' sums are not rounded to 16 bits, so
    their operands are widened: of 16-bit queries many rows go by fused attention.
    """
    wide = accumulation_dtype(query_KTGD.dtype)
    kv_heads, tokens, group, size = query_KTGD.shape
    if sink_H is not None:
        key_KSD, value_KSD, added_HTS = _with_sinks(key_KSD, value_KSD, added_HTS, sink_H, tokens)
    out_TKGD = out_THD.view(tokens, kv_heads, group, size)
    added_KGTS = None
    if added_HTS is not None:
        if added_HTS.device.type == "cuda":  # torch's kernel reads 16 bytes at a time from wherever a part begins
            added_HTS = added_HTS.clone()
        added_KGTS = added_HTS.expand(kv_heads * group, -1, -1).view(kv_heads, group, tokens, -1)
    on_cpu = query_KTGD.device.type == "cpu"
    by_products = on_cpu and query_KTGD.dtype is wide and tokens * group >= _PRODUCT_ROWS
    if added_KGTS is not None and added_KGTS.dtype is not query_KTGD.dtype and not on_cpu:
        by_products = True  # ALiBi's are not rounded to 16 bits, and fused kernels of a GPU take no others
    if softcap is None and not by_products:
        key_KGSD, value_KGSD = (each[:, None].expand(-1, group, -1, -1) for each in (key_KSD, value_KSD))
        out_KGTD = functional.scaled_dot_product_attention(
            query_KTGD.transpose(1, 2), key_KGSD, value_KGSD, attn_mask=added_KGTS, scale=scale
        )
        out_TKGD.copy_(out_KGTD.permute(2, 0, 1, 3))
        return
    for head in range(kv_heads):
        score_TGS = product(query_KTGD[head].flatten(0, 1).to(wide), key_KSD[head].to(wide), None)
        score_TGS = score_TGS.view(tokens, group, -1)
        if scale != 1.0:
            score_TGS.mul_(scale)
        if softcap is not None:
            score_TGS.div_(softcap).tanh_().mul_(softcap)
        if added_KGTS is not None:
            score_TGS.add_(added_KGTS[head].transpose(0, 1))
        weight_PS = torch.softmax(score_TGS, -1).flatten(0, 1)
        out_TKGD[:, head] = product(weight_PS, value_KSD[head].to(wide).t(), None).view(tokens, group, size)


def _with_sinks(
    key_KSD: Tensor, value_KSD: Tensor, added_HTS: Tensor | None, sink_H: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return one more key and value of zeros, and the scores' additions: what a zero key adds up to is the sink."""
    key_KSD, value_KSD = (functional.pad(each, (0, 0, 0, 1)) for each in (key_KSD, value_KSD))
    column_HT1 = sink_H[:, None, None].expand(-1, tokens, 1)
    if added_HTS is None:
        return key_KSD, value_KSD, functional.pad(column_HT1, (key_KSD.shape[1] - 1, 0))
    added_HTS = added_HTS.to(sink_H.dtype).expand(len(sink_H), -1, -1)
    return key_KSD, value_KSD, torch.cat((added_HTS, column_HT1), -1)


@_attend_blocks.register_fake
@_attend_varlen.register_fake
def _(query_KTGD: Tensor, *_: object) -> Tensor:
    kv_heads, tokens, group, size = query_KTGD.shape
    return query_KTGD.new_empty(tokens, kv_heads * group, size)


def alibi(position_R: Tensor, slot_S: Tensor, slope_H: Tensor, *, compute: torch.dtype) -> Tensor:
    """Return what ALiBi adds to the scores, [R, S, H] in float32 or wider; multiplied in the slopes' dtype, float64."""
    distance_RS = slot_S[None, :] - position_R[:, None]
    return (distance_RS[..., None] * slope_H).to(accumulation_dtype(compute))


def mask(
    position_T: Tensor, slot_S: Tensor, window: int | None, *, causal: bool = True, compute: torch.dtype
) -> Tensor:
    """Return what is added to the scores of many queries of one sequence, [T, S]: 0 where seen, -inf elsewhere."""
    return torch.where(_seen(position_T, slot_S, window, causal), 0.0, -torch.inf).to(compute)


def _seen(position_R: Tensor, slot_S: Tensor, window: int | None, causal: bool = True) -> Tensor:
    """Itself and all before it, or itself and the window - 1 before it; where not causal, all after it too."""
    distance_RS = position_R[:, None] - slot_S[None, :]
    seen_RS = distance_RS >= 0 if causal else torch.ones_like(distance_RS, dtype=torch.bool)
    return seen_RS if window is None else seen_RS & (distance_RS < window)
