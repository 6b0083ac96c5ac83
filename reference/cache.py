"""What a layer remembers of the tokens it has seen: their keys (already rotated) and values.

A cache is a value, not a place: `append` returns a new one and leaves the old as it was. So a sequence can be tried in
two ways from the same point, and extending in pieces is the same formula as extending at once: only rounding differs.

Shapes: B batch, S tokens so far, T new tokens, K key/value heads, D head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec.config import AttentionConfig


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """Keys and values [B, S, K, D] of one layer; token s of a sequence stands at index s."""

    key_BSKD: Tensor
    value_BSKD: Tensor

    @property
    def length(self) -> int:
        """S, the number of tokens held."""
        return self.key_BSKD.shape[1]


def empty(batch: int, config: AttentionConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> KVCache:
    """A cache of no tokens."""
    nothing = torch.empty(batch, 0, config.kv_heads, config.head_size, dtype=dtype, device=device)
    return KVCache(nothing, nothing)


def append(cache: KVCache, key_BTKD: Tensor, value_BTKD: Tensor) -> KVCache:
    """The cache with T more tokens at its end, [B, S + T, K, D]."""
    return KVCache(
        torch.cat([cache.key_BSKD, key_BTKD], dim=1),
        torch.cat([cache.value_BSKD, value_BTKD], dim=1),
    )
