"""The order of rows that GGUF keeps query and key projections in, and how to undo it.

Files of the `llama` architecture hold the rows of every query and key head so that elements 2j and 2j + 1 rotate
together; the Hugging Face order, and ours, has element j rotate with element j + D/2. Left in the wrong order a
model still writes fluent text, only worse: nothing else gives the mistake away.

Shapes: H heads, D head size, M hidden.
"""

from torch import Tensor

from ..spec.config import LayerConfig


def half_split_from_interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [H * D, ...], head by head: the even rows of the head, then its odd rows.

    Two heads of four rows each:

        >>> import torch
        >>> half_split_from_interleaved(torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]), heads=2).tolist()
        [0, 2, 1, 3, 10, 12, 11, 13]
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [H, D/2, 2, ...]
    return pairs.transpose(1, 2).reshape(rows.shape)


def query_rows(rows: Tensor, layer: LayerConfig) -> Tensor:
    return half_split_from_interleaved(rows, layer.attention.heads)


def key_rows(rows: Tensor, layer: LayerConfig) -> Tensor:
    return half_split_from_interleaved(rows, layer.attention.kv_heads)
