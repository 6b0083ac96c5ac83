"""Orders in which files keep the rows of query, key and value projections, and how to undo them.

Left in the wrong order a model still writes fluent text, only worse: nothing else gives the mistake away.

Shapes: H query heads, K key/value heads, G = H / K, D head size, M hidden.
"""

import torch
from torch import Tensor

from ..spec.config import LayerConfig


def half_split_from_interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows [H * D, ...], head by head: the even rows of the head, then its odd rows.

    GGUF files of the `llama` architecture hold the rows of every query and key head so that elements 2j and 2j + 1
    rotate together; the Hugging Face order, and ours, has element j rotate with element j + D/2. Two heads of four:

        >>> half_split_from_interleaved(torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]), heads=2).tolist()
        [0, 2, 1, 3, 10, 12, 11, 13]
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # [H, D/2, 2, ...]
    return pairs.transpose(1, 2).reshape(rows.shape)


def query_rows(rows: Tensor, layer: LayerConfig) -> Tensor:
    return half_split_from_interleaved(rows, layer.attention.heads)


def key_rows(rows: Tensor, layer: LayerConfig) -> Tensor:
    return half_split_from_interleaved(rows, layer.attention.kv_heads)


def separated(rows: Tensor, kv_heads: int, head_size: int) -> Tensor:
    """Rows [(H + 2 K) * D, ...] kept group by group, each G query heads with the key and value head that they share, as
    all queries, then all keys, then all values.

    So files keep them where a tensor-parallel rank was to get whole groups: Megatron-LM, BLOOM, GPT-NeoX (all G = 1),
    Falcon, InternLM 2. Two groups of two queries, one element a head:

        >>> separated(torch.tensor([0, 1, 90, 190, 2, 3, 91, 191]), kv_heads=2, head_size=1).tolist()
        [0, 1, 2, 3, 90, 91, 190, 191]
    """
    groups = rows.reshape(kv_heads, -1, head_size, *rows.shape[1:])  # [K, G + 2, D, ...]
    query, key, value = groups[:, :-2], groups[:, -2], groups[:, -1]
    return torch.cat([each.reshape(-1, *rows.shape[1:]) for each in (query, key, value)])


def separated_qkv(rows: Tensor, layer: LayerConfig) -> Tensor:
    return separated(rows, layer.attention.kv_heads, layer.attention.head_size)


def separated_thirds(rows: Tensor, layer: LayerConfig | None = None) -> Tensor:
    """Rows [H * D * 3, ...] in which every element's query, key and value stand together, as all queries, then all
    keys, then all values: checkpoints of version 1 of Megatron-LM.

    Whatever the heads, two elements:

        >>> separated_thirds(torch.tensor([0, 100, 200, 1, 101, 201])).tolist()
        [0, 1, 100, 101, 200, 201]
    """
    return rows.reshape(-1, 3, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
