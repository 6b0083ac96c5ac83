"""What a layer, or a block of the head, makes on its way."""

import math
from collections.abc import Mapping

from ..spec.config import LayerConfig, ModelConfig, Storage
from ..spec.moe import MoeConfig
from ..spec.shapes import layer_shapes
from .form import Record
from .store import Store

_Shape = tuple[int, int]
"""Outputs and inputs of a matrix."""


def work_bytes(store: Store, config: ModelConfig, tokens: int, slots: int, expands: bool, rows: int) -> int:
    """Return the most bytes that are made at a time, in float32.

    Of many tokens: activations of every width at once, and scores of a block of queries. Of weights: a packed matrix is
    expanded for a product of many rows; uncompiled (`expands`), also what each of its steps makes. Of a layer that is
    cut, only what one of its records makes.
    """
    copies = _copies(store.storage, expands)
    most = 0
    for layer, mlp in dict(zip(config.layers, store.mlp, strict=True)).items():
        shapes = layer_shapes(layer, config.hidden)
        experts = [(shape[1], shape[2]) for shape in shapes.values() if len(shape) == 3]
        top_k = layer.mlp.router.top_k if isinstance(layer.mlp, MoeConfig) else 0
        matrices = _of_attention(layer, config.hidden) if mlp[0] else _merged(shapes)
        widths = sum(outputs for outputs, _ in matrices) + 4 * config.hidden
        widths += top_k * (sum(outputs for outputs, _ in experts) + 3 * config.hidden)
        for of_matrix in filter(None, mlp):
            outputs, _ = block = _shape(of_matrix[0], store.storage)
            matrices.append(block)
            widths = max(widths, 2 * len(of_matrix) * outputs)  # all blocks' outputs, and the same joined
        largest, copied = max(outputs * inputs for outputs, inputs in matrices), 0
        if experts:
            merged = _merged({str(place): shape for place, shape in enumerate(experts)})
            one = max(outputs * inputs for outputs, inputs in merged)
            largest = max(largest, one)
            copied = 2 * rows * top_k * one if expands else 0  # the weights of a pass's choices, and their products
        scores = layer.attention.heads * min(tokens, 128) * slots
        most = max(most, 4 * (2 * tokens * widths + 2 * scores + max(copied, largest * copies)))
    return max(most, 4 * math.prod(_shape(store.head[0], store.storage)) * copies)


def _of_attention(layer: LayerConfig, hidden: int) -> list[_Shape]:
    """Return the matrices of attention: query, key and value are one."""
    attention = layer.attention
    heads = attention.heads + 2 * attention.kv_heads
    return [(heads * attention.head_size, hidden), (hidden, attention.heads * attention.head_size)]


def _merged(shapes: Mapping[str, tuple[int, ...]]) -> list[_Shape]:
    """Return matrices as they are prepared: those of equal inputs may be one, so they count as one."""
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    inputs = {shape[1] for shape in matrices}
    return [(sum(shape[0] for shape in matrices if shape[1] == each), each) for each in inputs]


def _shape(record: Record, storage: Storage) -> _Shape:
    """Return the shape of a record that is one matrix, inputs with what packing adds."""
    word, outputs = record.tensors()[0], record.form["outputs"]
    return outputs, math.prod(word.shape) * _weights_a_word(storage) // outputs


def _copies(storage: Storage, expands: bool) -> int:
    if storage is Storage.FLOAT32:
        return 1
    return 4 if expands else 2


def _weights_a_word(storage: Storage) -> int:
    return {Storage.FLOAT32: 1, Storage.BFLOAT16: 2, Storage.INT8: 4, Storage.INT4: 8}[storage]
