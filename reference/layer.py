"""One transformer layer: attention, then the MLP, each reading a normalised copy of the stream and adding to it.

    x = x + output(attention(rotate(query(n)), rotate(key(n)), value(n))),   n = norm(x)
    x = x + mlp(norm(x))

Norm, linear maps, rotation, attention and MLP are `Components`; swap one to try an idea on a real model.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from ..spec.config import AttentionConfig, LayerConfig
from ..spec.weights import AttentionWeights, LayerWeights
from .attention import visible
from .cache import KVCache, append

if TYPE_CHECKING:
    from .components import Components


def layer(
    x_BTM: Tensor, weights: LayerWeights, config: LayerConfig, cache: KVCache, components: Components
) -> tuple[Tensor, KVCache]:
    """Pass T tokens that follow the cache's S; returns [B, T, M] and the cache of S + T tokens."""
    normed_BTM = components.norm(x_BTM, weights.attention_norm, config.norm)
    attended_BTM, cache = self_attention(normed_BTM, weights.attention, config.attention, cache, components)
    x_BTM = x_BTM + attended_BTM
    normed_BTM = components.norm(x_BTM, weights.mlp_norm, config.norm)
    return x_BTM + components.mlp(normed_BTM, weights.mlp, config.mlp, linear=components.linear), cache


def self_attention(
    x_BTM: Tensor, weights: AttentionWeights, config: AttentionConfig, cache: KVCache, components: Components
) -> tuple[Tensor, KVCache]:
    """Project, rotate, remember, attend, project back; returns [B, T, M] and the cache of S + T tokens."""
    query_BTHD = rearrange(components.linear(x_BTM, weights.query), "b t (h d) -> b t h d", d=config.head_size)
    key_BTKD = rearrange(components.linear(x_BTM, weights.key), "b t (k d) -> b t k d", d=config.head_size)
    value_BTKD = rearrange(components.linear(x_BTM, weights.value), "b t (k d) -> b t k d", d=config.head_size)

    position_S = torch.arange(cache.length + x_BTM.shape[1], device=x_BTM.device)
    position_T = position_S[cache.length :]
    if config.rotary is not None and weights.rotary_frequency_J is not None:
        query_BTHD = components.rotate(query_BTHD, position_T, weights.rotary_frequency_J, config.rotary.layout)
        key_BTKD = components.rotate(key_BTKD, position_T, weights.rotary_frequency_J, config.rotary.layout)

    cache = append(cache, key_BTKD, value_BTKD)
    out_BTHD = components.attention(
        query_BTHD,
        cache.key_BSKD,
        cache.value_BSKD,
        visible_TS=visible(position_T, position_S, window=config.window),
        scale=config.scale,
    )
    return components.linear(rearrange(out_BTHD, "b t h d -> b t (h d)"), weights.output), cache
