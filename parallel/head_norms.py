"""A norm over the elements of all heads, which lie on several ranks: what each rank sums up, and what the sums make.

    RMS norm     one sum of squares a token; layer norm: a sum, then a sum of squares of the centered values

Why it is faster: one number a token travels. Where ranks exceed key/value heads several hold the same head; its
elements come equally often in the sums and in their count, so the mean is that of each once.

Shapes: T tokens, G = H + 2 K heads of a rank, D head size, N elements of its query or key heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..compiled.compute import accumulation_dtype
from ..compiled.norms import Norm
from ..compiled.weights import Layer
from ..spec.config import AttentionConfig, NormConfig, NormKind

Sums = tuple[Tensor, Tensor]
"""Of queries and of keys, [T, 1] each, in the accumulation dtype."""


def sums(qkv_TGD: Tensor, config: AttentionConfig) -> Sums:
    """Return what a layer norm reduces first."""
    return _of_both(qkv_TGD, config, lambda x_TN: x_TN.sum(-1, keepdim=True))


def centered(qkv_TGD: Tensor, sum_2T1: Sums, config: AttentionConfig, ranks: int) -> Tensor:
    """Return queries and keys without their means, values as they are, in the accumulation dtype."""
    query_TN, key_TN, value_TN = _parts(qkv_TGD, config)
    means = [total_T1 / (x_TN.shape[1] * ranks) for x_TN, total_T1 in zip((query_TN, key_TN), sum_2T1, strict=True)]
    return torch.cat((query_TN - means[0], key_TN - means[1], value_TN), 1).view(qkv_TGD.shape)


def squares(qkv_TGD: Tensor, config: AttentionConfig) -> Sums:
    """Return what is reduced last: sums of squares."""
    return _of_both(qkv_TGD, config, lambda x_TN: (x_TN * x_TN).sum(-1, keepdim=True))


def normed(
    qkv_TGD: Tensor, square_2T1: Sums, weights: Layer, config: AttentionConfig, ranks: int, dtype: torch.dtype
) -> Tensor:
    """Return the heads, queries and keys normed by the sums of squares of all ranks."""
    assert config.qk_norm is not None
    assert weights.query_norm is not None
    assert weights.key_norm is not None
    query_TN, key_TN, value_TN = _parts(qkv_TGD, config)
    query_TN = _scaled(query_TN, square_2T1[0], weights.query_norm, config.qk_norm, ranks)
    key_TN = _scaled(key_TN, square_2T1[1], weights.key_norm, config.qk_norm, ranks)
    return torch.cat((query_TN, key_TN, value_TN), 1).to(dtype).view(qkv_TGD.shape)


def centers(config: NormConfig) -> bool:
    """Return whether means are taken off first, which takes one more reduction."""
    return config.kind is NormKind.LAYER


def _scaled(x_TN: Tensor, square_T1: Tensor, weights: Norm, config: NormConfig, ranks: int) -> Tensor:
    out_TN = x_TN * torch.rsqrt(square_T1 / (x_TN.shape[1] * ranks) + config.epsilon) * weights.gain_M
    return out_TN if weights.bias_M is None else out_TN + weights.bias_M


def _of_both(qkv_TGD: Tensor, config: AttentionConfig, each: Callable[[Tensor], Tensor]) -> Sums:
    query_TN, key_TN, _ = _parts(qkv_TGD, config)
    return each(query_TN), each(key_TN)


def _parts(qkv_TGD: Tensor, config: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    wide_TGD = qkv_TGD.to(accumulation_dtype(qkv_TGD.dtype))
    value = config.heads + config.kv_heads
    return (
        wide_TGD[:, : config.heads].flatten(1),
        wide_TGD[:, config.heads : value].flatten(1),
        wide_TGD[:, value:].flatten(1),
    )
