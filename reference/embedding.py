"""The two ends of a decoder: token ids to hidden vectors, hidden vectors to logits.

    in:   x[t] = norm(scale * token_table[token[t]] + position_table[position[t]] + type_table[type[t]])
    out:  logits[t] = cap(scale * (projection @ x[t] + bias));  a tied head uses the token table as its projection

Most models have few of these terms: what a model lacks is left out. Rows of a table that is not as wide as the hidden
vector are projected to it (and it is reduced to that width before the head: see `decoder`).

Shapes: B batch, T tokens, M hidden, W table width, V vocabulary, P positions, Y token types.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.config import ModelConfig
from ..spec.weights import EmbeddingWeights, LinearWeights
from .components import DEFAULT, Components
from .linear import linear as plain_linear


def embed(
    token_BT: Tensor,
    position_T: Tensor,
    weights: EmbeddingWeights,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    type_BT: Tensor | None = None,
    components: Components = DEFAULT,
) -> Tensor:
    """Look up tokens, and what else the model learned of their places; returns [B, T, M], rounded once, to `dtype`.

    Tokens whose types are not given are of the first.
    """
    wide = torch.promote_types(dtype, torch.float32)
    x_BTM = weights.token_VW[token_BT].to(wide)
    if weights.projection is not None:
        x_BTM = components.linear(x_BTM, weights.projection)
    x_BTM = config.embedding_scale * x_BTM
    if weights.position_PM is not None:
        x_BTM = x_BTM + weights.position_PM[position_T].to(wide)
    if weights.type_YM is not None:
        x_BTM = x_BTM + weights.type_YM[torch.zeros_like(token_BT) if type_BT is None else type_BT].to(wide)
    if weights.norm is not None and config.embedding_norm is not None:
        x_BTM = components.norm(x_BTM, weights.norm, config.embedding_norm)
    return x_BTM.to(dtype)


def head_logits(
    x: Tensor, projection: LinearWeights, *, linear: Callable[[Tensor, LinearWeights], Tensor] = plain_linear
) -> Tensor:
    """Score every token of the vocabulary: normalized hidden [..., M] to logits [..., V], float32 or wider.

    Logits are not rounded to a narrow x's dtype: neighboring tokens would tie.
    """
    return linear(x.to(torch.promote_types(x.dtype, torch.float32)), projection)


def scale_and_cap(logits: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """Multiply logits, then bend them into -softcap .. softcap: softcap * tanh(scale * logits / softcap). Any shape.

    >>> scale_and_cap(torch.tensor([0.0, 4.0, 1e9]), scale=0.5, softcap=2.0)
    tensor([0.0000, 1.5232, 2.0000])
    """
    logits = scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
