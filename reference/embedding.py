"""The two ends of a decoder: token ids to hidden vectors, hidden vectors to logits.

    in:   x[t] = token_table[token[t]]  (+ position_table[position[t]], where positions are learned)
    out:  logits[t] = projection @ norm(x[t]);  a tied head uses the token table as its projection

Shapes: B batch, T tokens, M hidden, V vocabulary, P positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.weights import EmbeddingWeights, LinearWeights
from .linear import linear as plain_linear


def embed(token_BT: Tensor, position_T: Tensor, weights: EmbeddingWeights, dtype: torch.dtype) -> Tensor:
    """Look up tokens, and positions if the model learned them; returns [B, T, M] in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    x_BTM = weights.token_VE[token_BT].to(wide)
    if weights.position_PM is not None:
        x_BTM = x_BTM + weights.position_PM[position_T].to(wide)
    return x_BTM.to(dtype)


def head_logits(
    x: Tensor, projection: LinearWeights, *, linear: Callable[[Tensor, LinearWeights], Tensor] = plain_linear
) -> Tensor:
    """Score every token of the vocabulary: normalised hidden [..., M] to logits [..., V], float32 or wider.

    Logits are not rounded to a narrow x's dtype: neighbouring tokens would tie.
    """
    return linear(x.to(torch.promote_types(x.dtype, torch.float32)), projection)
