"""What follows the last layer: the head at every position, for evaluating texts, and the shaping of logits.

A decode step's head is `linear.linear_decode`.

Shapes: T tokens, M hidden, V vocabulary.
"""

import torch
from torch import Tensor

from ..spec.config import Storage
from .linear import linear_prefill
from .packing import ROWS, Matrix
from .precision import accumulation_dtype

_BLOCK_WEIGHTS = 2**21  # 8 MiB of float32


def head_prefill(hidden_TM: Tensor, head: Matrix, storage: Storage, *, block_weights: int = _BLOCK_WEIGHTS) -> Tensor:
    """Return logits [T, V] in float32 or wider: rounded to 16 bits, likely tokens would tie.

    A packed head is expanded `block_weights` elements at a time, not at once.
    """
    hidden_TM = hidden_TM.to(accumulation_dtype(hidden_TM.dtype))
    if storage is Storage.FLOAT32:
        return linear_prefill(hidden_TM, head, storage)
    tokens, hidden = hidden_TM.shape
    step = max(1, block_weights // hidden // ROWS)
    logits_TV = hidden_TM.new_empty(tokens, head.outputs)
    for first in range(0, head.word.shape[0], step):
        piece, columns = slice(first, first + step), slice(first * ROWS, (first + step) * ROWS)
        of_piece = head._replace(
            word=head.word[piece],
            scale_N=None if head.scale_N is None else head.scale_N[columns],
            scale_BGU=None if head.scale_BGU is None else head.scale_BGU[piece],
            min_BGU=None if head.min_BGU is None else head.min_BGU[piece],
            bias_N=None if head.bias_N is None else head.bias_N[columns],
            outputs=min(step * ROWS, head.outputs - first * ROWS),
        )
        logits_TV[:, columns] = linear_prefill(hidden_TM, of_piece, storage)
    return logits_TV


def scale_and_cap(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(scale * logits / softcap), elementwise."""
    if softcap is not None:
        return softcap * torch.tanh((scale / softcap) * logits)
    return logits if scale == 1.0 else logits * scale
