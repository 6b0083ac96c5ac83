"""The `WeightSource` of every kind of file: reads one part at a time, as the family's table says.

What it hands out may be views of the mapped file: a whole model is never held here.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..spec.config import LayerConfig, ModelConfig
from ..spec.weights import (
    AttentionWeights,
    EmbeddingWeights,
    HeadWeights,
    LayerWeights,
    LinearWeights,
    MlpWeights,
    NormWeights,
)
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
        weights = self._read(self._plan.embedding, None)
        return EmbeddingWeights(token_VM=weights["token_VM"], position_PM=weights.get("position_PM"))

    def layer(self, index: int) -> LayerWeights:
        weights = self._read(self._plan.layers[index], self.config.layers[index])
        return LayerWeights(
            attention_norm=_norm(weights, "attention_norm"),
            attention=AttentionWeights(
                query=_linear(weights, "attention.query"),
                key=_linear(weights, "attention.key"),
                value=_linear(weights, "attention.value"),
                output=_linear(weights, "attention.output"),
                rotary_frequency_J=self._frequencies[index],
            ),
            mlp_norm=_norm(weights, "mlp_norm"),
            mlp=MlpWeights(
                up=_linear(weights, "mlp.up"),
                down=_linear(weights, "mlp.down"),
                gate=_linear(weights, "mlp.gate") if "mlp.gate.weight_NI" in weights else None,
            ),
        )

    def head(self) -> HeadWeights:
        weights = self._read(self._plan.head, None)
        tied = "projection.weight_NI" not in weights
        return HeadWeights(norm=_norm(weights, "norm"), projection=None if tied else _linear(weights, "projection"))

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


def _linear(weights: Mapping[str, Tensor], name: str) -> LinearWeights:
    return LinearWeights(weight_NI=weights[f"{name}.weight_NI"], bias_N=weights.get(f"{name}.bias_N"))


def _norm(weights: Mapping[str, Tensor], name: str) -> NormWeights:
    return NormWeights(gain_M=weights[f"{name}.gain_M"], bias_M=weights.get(f"{name}.bias_M"))
