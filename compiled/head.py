"""What follows the last layer: the head at every position, for evaluating texts, and the shaping of logits.

A decode step's head is `linear.linear_few`.

Shapes: T tokens, M hidden, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..spec.config import Storage
from .linear import Matrix
from .packing import unpack

_BLOCK_WEIGHTS = 2**21  # 8 MiB of float32


def head_many(hidden_TM: Tensor, head: Matrix, storage: Storage, *, block_weights: int = _BLOCK_WEIGHTS) -> Tensor:
    """Logits [T, V], float32. A packed head is expanded `block_weights` elements at a time, not at once."""
    if storage is Storage.FLOAT32:
        return functional.linear(hidden_TM, head.word_NJ, head.bias_N)
    tokens, hidden = hidden_TM.shape
    vocabulary, step = head.word_NJ.shape[0], max(1, block_weights // hidden)
    logits_TV = torch.empty(tokens, vocabulary, device=hidden_TM.device)
    for first in range(0, vocabulary, step):
        block = slice(first, first + step)
        scale = None if head.scale_N is None else head.scale_N[block]
        bias = None if head.bias_N is None else head.bias_N[block]
        weight_VM = unpack(head.word_NJ[block], scale, storage, hidden)
        logits_TV[:, block] = functional.linear(hidden_TM, weight_VM, bias)
    return logits_TV


def scale_and_cap(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """softcap * tanh(scale * logits / softcap), elementwise."""
    if softcap is not None:
        return softcap * torch.tanh((scale / softcap) * logits)
    return logits if scale == 1.0 else logits * scale
