"""What enters the first layer: rows of tables, added up; in a graph one pass with the first layer's norm.

Shapes: T rows, M hidden, W table width, P positions, Y token types.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.config import ModelConfig, Storage
from .compute import accumulation_dtype
from .linear import lookup
from .norms import Norm, norm
from .packing import Matrix

Product = Callable[[Tensor, Matrix, Storage], Tensor]
"""`linear_decode` or `linear_prefill`."""


class Embedding(NamedTuple):
    table: Matrix
    projection: Matrix | None
    """[M, W], where the table is not as wide as the hidden vector."""
    position_PM: Tensor | None
    type_YM: Tensor | None
    norm: Norm | None


def embed(
    token_T: Tensor,
    position_T: Tensor,
    weights: Embedding,
    config: ModelConfig,
    storage: Storage,
    product: Product,
    type_T: Tensor | None = None,
    *,
    compute: torch.dtype,
) -> Tensor:
    """Return hidden vectors [T, M] of tokens at their positions, rounded once, to compute.

    Without types, all tokens are of the first, as a decoder's are. Rows lie side by side, as layers return them: the
    second layer runs through the piece that was compiled for the first, without guards on strides, and unpacked rows
    are a view of longer ones where the words' places do not divide the width.
    """
    x_TW = lookup(token_T, weights.table, storage, config.table_width, accumulation_dtype(compute))
    return embed_rows(x_TW, position_T, weights, config, storage, product, type_T, compute=compute)


def embed_rows(
    x_TM: Tensor,
    position_T: Tensor,
    weights: Embedding,
    config: ModelConfig,
    storage: Storage,
    product: Product,
    type_T: Tensor | None = None,
    *,
    compute: torch.dtype,
) -> Tensor:
    """Do the same with the tokens' rows of the table, [T, W]."""
    if weights.projection is not None:
        x_TM = product(x_TM, weights.projection, storage)
    if config.embedding_scale != 1.0:
        x_TM = x_TM * config.embedding_scale
    if weights.position_PM is not None:
        x_TM = x_TM + weights.position_PM[position_T]
    if weights.type_YM is not None:
        x_TM = x_TM + weights.type_YM[0 if type_T is None else type_T]
    if weights.norm is not None and config.embedding_norm is not None:
        x_TM = norm(x_TM, weights.norm.gain_M, weights.norm.bias_M, config.embedding_norm)
    return x_TM.to(compute).contiguous()
