"""The `WeightSource` of every kind of file: reads one part at a time, as the family's table says.

What it hands out may be views of the mapped file: a whole model is never held here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..spec.ambient import CPU, pinned
from ..spec.config import LayerConfig, ModelConfig
from ..spec.errors import ConfigError
from ..spec.shard import (
    Shard,
    Slices,
    embedding_slices,
    head_slices,
    index_of,
    layer_slices,
    slices_of_expert,
    slices_without_experts,
)
from ..spec.weights import EmbeddingWeights, ExpertWeights, HeadWeights, LayerWeights, assemble, experts_of
from .expert_reading import read_experts
from .plan import Buffers, Reading, TensorStore, plan
from .sliced_reading import read_slices
from .table import Heads, Table


class FileSource:
    """Weights of a model in a file or folder, or of a live module.

    Every name and shape is checked here, before any tensor is read or made; raises `WeightError` for what does not fit,
    and `ConfigError` where more tokens are asked for than the model was made for.
    """

    def __init__(
        self,
        config: ModelConfig,
        table: Table,
        store: TensorStore,
        buffers: Buffers,
        *,
        first_position: int = 0,
        most_tokens: int | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.config = limited(config, most_tokens)
        self._store = store
        with pinned(CPU):
            self._plan = plan(table, config, store, buffers, first_position)
        self._buffers = buffers
        self.notes = tuple(dict.fromkeys(notes))
        """What whoever opens the model should know, though nothing is wrong."""

    def tensor_table(self) -> bytes:
        """Return what the file says of all its tensors, for ranks to compare."""
        return self._store.tensor_table()

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        slices = None if shard is None else embedding_slices(self.config, shard)
        return cut(assemble(EmbeddingWeights, self._read(self._plan.embedding, {}, slices)), self.config)

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        slices = None if shard is None else layer_slices(self.config, index, shard)
        buffers = _made(self._buffers.layers[index])
        return assemble(LayerWeights, self._read(self._plan.layers[index], buffers, slices, self.config.layers[index]))

    def layer_without_experts(self, index: int) -> LayerWeights:
        slices, buffers = slices_without_experts(self.config, index), _made(self._buffers.layers[index])
        return assemble(LayerWeights, self._read(self._plan.layers[index], buffers, slices, self.config.layers[index]))

    def expert(self, index: int, expert: int) -> ExpertWeights:
        readings = tuple(each for each in self._plan.layers[index] if each.stored.experts is not None)
        return experts_of(self._read(readings, {}, slices_of_expert(self.config, index, expert)))

    def head(self, shard: Shard | None = None) -> HeadWeights:
        slices = None if shard is None else head_slices(self.config, shard)
        return assemble(HeadWeights, self._read(self._plan.head, _made(self._buffers.head), slices))

    def _read(
        self,
        readings: tuple[Reading, ...],
        buffers: Mapping[str, Tensor],
        slices: Slices | None,
        layer: LayerConfig | None = None,
    ) -> dict[str, Tensor]:
        """Read a part's weights by name, buffers among them; with slices, only what they say of each."""
        if slices is not None:
            weights = {name: buffer[index_of(slices[name])] for name, buffer in buffers.items()}
            for reading in readings:
                if reading.stored.experts is not None:
                    weights |= read_experts(self._store, reading, slices)
                else:
                    weights |= read_slices(self._store, reading, slices, layer)
            return weights
        weights = dict(buffers)
        for reading in readings:
            if reading.stored.experts is not None:
                with pinned(CPU):
                    weights |= read_experts(self._store, reading, None)
                continue
            with pinned(CPU):
                tensor = self._rows(reading)
            if reading.stored.reorder is not None:
                assert layer is not None, "only layers hold rows in another order"
                tensor = reading.stored.reorder(tensor, layer)
            pieces = torch.split(tensor, list(reading.fills.values()))
            weights.update(zip(reading.fills, pieces, strict=True))
        return weights

    def _rows(self, reading: Reading) -> Tensor:
        """What fills the weights, stacked: [outputs, ...]."""
        parts = [self._store.read(name) for name in reading.names]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if reading.stored.transposed:
            tensor = tensor.transpose(0, -1)
        if reading.stored.heads is Heads.SHARED:
            tensor = tensor.repeat(sum(reading.fills.values()) // len(tensor))
        if reading.stored.heads is Heads.STACKED or reading.stored.one_row:
            tensor = tensor.flatten()
        return tensor[reading.skip :]


def _made(buffers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    return {name: make() for name, make in buffers.items()}


def limited(config: ModelConfig, most_tokens: int | None) -> ModelConfig:
    """The config of a model opened for sequences of so many tokens; None for as many as it was made for."""
    if most_tokens is not None and not 1 <= most_tokens <= config.context:
        raise ConfigError(
            f"the context asked for is {most_tokens} tokens; in this model it must be 1 to {config.context}"
        )
    return config if most_tokens is None else replace(config, context=most_tokens)


def cut(weights: EmbeddingWeights, config: ModelConfig) -> EmbeddingWeights:
    """Without the positions that the config's context leaves out."""
    if weights.position_PM is None:
        return weights
    return replace(weights, position_PM=weights.position_PM[: config.context])
