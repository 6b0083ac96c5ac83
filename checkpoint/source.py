"""The `WeightSource` of every kind of file: reads one part at a time, as the family's table says.

What it hands out may be views of the mapped file: a whole model is never held here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.config import LayerConfig, ModelConfig
from ..spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, assemble
from .table import Reading, Table, TensorStore, plan


class FileSource:
    """Weights of a model in a file or folder.

    Every name and shape is checked here, before any tensor is read; raises `WeightError` for what does not fit.
    `frequencies` holds one tensor of rotary frequencies for each layer (most models share one), or None.
    """

    def __init__(
        self, config: ModelConfig, table: Table, store: TensorStore, frequencies: Sequence[Tensor | None]
    ) -> None:
        self.config = config
        self._store = store
        self._plan = plan(table, config, store)
        self._frequencies = tuple(frequencies)

    def embedding(self) -> EmbeddingWeights:
        return assemble(EmbeddingWeights, self._read(self._plan.embedding, None))

    def layer(self, index: int) -> LayerWeights:
        weights = self._read(self._plan.layers[index], self.config.layers[index])
        frequency_J = self._frequencies[index]
        made = {} if frequency_J is None else {"attention.rotary_frequency_J": frequency_J}
        return assemble(LayerWeights, weights | made)

    def head(self) -> HeadWeights:
        return assemble(HeadWeights, self._read(self._plan.head, None))

    def _read(self, readings: tuple[Reading, ...], layer: LayerConfig | None) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for reading in readings:
            tensor = self._store.read(reading.name)
            if reading.stored.transposed:
                tensor = tensor.transpose(0, -1)
            if reading.stored.reorder is not None:
                assert layer is not None, "only layers hold rows in another order"
                tensor = reading.stored.reorder(tensor, layer)
            pieces = torch.split(tensor, list(reading.fills.values()))
            weights.update(zip(reading.fills, pieces, strict=True))
        return weights
