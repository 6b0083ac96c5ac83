"""A whole decoder up to its head: embed the tokens, pass them through every layer, normalize.

Shapes: B batch, T new tokens, M hidden, W table width (M, in nearly every model).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec.config import ModelConfig
from ..spec.errors import NumericsError
from ..spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, LinearWeights
from .cache import KVCache, empty
from .components import DEFAULT, Components
from .embedding import embed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderWeights:
    embedding: EmbeddingWeights
    layers: tuple[LayerWeights, ...]
    head: HeadWeights

    @property
    def projection(self) -> LinearWeights:
        """The head's own weight, or the token table where the head is tied, with the bias if there is one."""
        own = self.head.projection
        return LinearWeights(
            weight_NI=self.embedding.token_VW if own is None else own.weight_NI, bias_N=self.head.bias_V
        )


def empty_caches(
    batch: int, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[KVCache, ...]:
    """One cache of no tokens for each layer: where every sequence starts."""
    return tuple(empty(batch, layer.attention, dtype, device) for layer in config.layers)


def forward(
    token_BT: Tensor,
    caches: tuple[KVCache, ...],
    weights: DecoderWeights,
    config: ModelConfig,
    dtype: torch.dtype,
    components: Components = DEFAULT,
    *,
    type_BT: Tensor | None = None,
) -> tuple[Tensor, tuple[KVCache, ...]]:
    """Pass T tokens that follow those in the caches; returns the hidden vectors that `head_logits` scores, [B, T, W].

    Activations are kept in `dtype` between components. The caches handed in stay as they were. Raises `NumericsError`
    with the layer's number where a router's logit is NaN.
    """
    start = caches[0].length
    position_T = torch.arange(start, start + token_BT.shape[1], device=token_BT.device)
    x_BTM = embed(token_BT, position_T, weights.embedding, config, dtype, type_BT=type_BT, components=components)
    grown = []
    for index, each in enumerate(zip(weights.layers, config.layers, caches, strict=True)):
        try:
            x_BTM, cache = components.layer(x_BTM, *each, components)
        except NumericsError as error:
            raise NumericsError(f"layer {index}: {error}") from None
        grown.append(cache)
    if weights.head.norm is not None and config.final_norm is not None:
        x_BTM = components.norm(x_BTM, weights.head.norm, config.final_norm)
    x_BTW = x_BTM if weights.head.reduction is None else components.linear(x_BTM, weights.head.reduction)
    return x_BTW, tuple(grown)
