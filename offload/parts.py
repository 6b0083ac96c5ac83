"""What becomes a store's records: each layer, its experts, blocks of the head and the token table, and the rest.

Nothing is read before it is prepared, and what was prepared is forgotten once it is written: one layer is held at a
time, or one expert where the source reads them one by one.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..compiled.experts import one_expert
from ..compiled.moe import Mlp
from ..compiled.packing import ROWS, Matrix, Quantized, pack, quantize
from ..compiled.weights import (
    Layer,
    find_rotations,
    prepare_embedding,
    prepare_experts,
    prepare_head,
    prepare_layer,
    prepared_norm,
)
from ..spec.ambient import CPU
from ..spec.config import INT4_GROUP, Head, MlpConfig, ModelConfig, Storage
from ..spec.moe import MoeConfig
from ..spec.shard import index_of, slices_of_expert, slices_without_experts
from ..spec.weights import (
    ExpertWeights,
    ExpertwiseSource,
    LayerWeights,
    LinearWeights,
    WeightSource,
    experts_of,
    sliced,
    tensors,
    validate_embedding,
    validate_expert,
    validate_head,
    validate_layer,
    validate_without_experts,
)
from .cutting import BITS, Blocks, block_bytes, blocks_of, down_block, up_block, without_mlp
from .form import Resident, bytes_of
from .rank_source import RankSource

_LEAST_BLOCK = 1 << 15
"""Bytes of the smallest blocks of the head: below, a read costs more than what it brings."""


class Part(NamedTuple):
    """What becomes a record."""

    kind: str
    """layers, mlp, experts, head, table or resident."""
    name: str
    prepare: Callable[[], Any]


def parts(source: WeightSource, storage: Storage, device: str = "cpu") -> Iterator[Part]:
    """Yield what a store for a type of device holds, in the file's order. Nothing is read before it is prepared."""
    config = source.config
    blocks = _Blocks(source, storage, device)
    for index in range(len(config.layers)):
        cuts = cuts_of(source, index, storage, device)
        cut = "" if cuts is None else ", attention"
        yield Part("layers", f"layer {index}{cut}", lambda index=index: blocks.layer(index))  # type: ignore[misc]
        for part, count in cuts._asdict().items() if cuts is not None else ():
            for place in range(count):
                name = f"layer {index}, {part}" + (f" {place + 1} of {count}" if count > 1 else "")
                yield Part("mlp", name, lambda at=(index, part, place): blocks.mlp(*at))  # type: ignore[misc]
        for expert in range(experts_of_layer(source, index)):
            for place, part in enumerate(("up", "down")):
                name = f"layer {index}, expert {expert}, {part}"
                yield Part("experts", name, lambda at=(index, expert, place): blocks.expert(*at))  # type: ignore[misc]
    tied = blocks.tied
    for kind in ("head",) if tied else ("head", "table"):
        for first in range(0, blocks.rows * blocks.count, blocks.rows):
            name = f"{kind} rows {first} to {min(first + blocks.rows, config.vocabulary) - 1}"
            yield Part(kind, name, lambda kind=kind, first=first: blocks.block(kind, first))  # type: ignore[misc]
    yield Part("resident", "what stays in memory", blocks.resident)


class _Blocks:
    """Prepares the parts of a model, holding on to the token table while that is cut."""

    def __init__(self, source: WeightSource, storage: Storage, device: str) -> None:
        self._source, self._config, self._storage, self._device = source, source.config, storage, device
        self._frequencies: dict[int, Tensor | None] = {}
        self._checksums: dict[tuple[str, int], list[int]] = {}
        self._whole: tuple[str, Quantized, Tensor | None] | None = None
        self._experts = source if isinstance(source, ExpertwiseSource) else _Layerwise(source)
        self._expert: tuple[int, int, Mlp] | None = None
        self._cut: tuple[int, Layer] | None = None
        config = source.config
        largest = max(block_bytes(layer, config.hidden, storage, device) for layer in config.layers)
        most = max(ROWS, max(_LEAST_BLOCK, largest) * 8 // (BITS[storage] * _padded(config.table_width)))
        self.count = -(-source.config.vocabulary // most)
        self.rows = -(-source.config.vocabulary // self.count // ROWS) * ROWS

    @property
    def tied(self) -> bool:
        """Whether the head is the token table."""
        return self._config.head is Head.TIED

    def layer(self, index: int) -> Any:
        """Prepare a layer but for its experts, and but for its MLP where that has records of its own."""
        weights = self._without_experts(index)
        self._note_frequency(index, weights.attention.rotary_frequency_J)
        config = self._config.layers[index]
        of_rows = self._source.of_rows(index) if isinstance(self._source, RankSource) else None
        layer = prepare_layer(weights, config, self._storage, CPU, of_rows=of_rows)
        if cuts_of(self._source, index, self._storage, self._device) is None:
            return layer
        self._cut = index, layer
        return without_mlp(layer)

    def mlp(self, index: int, part: str, place: int) -> Matrix:
        """Prepare a block of an MLP's up or down."""
        config = self._config.layers[index]
        if self._cut is None or self._cut[0] != index:  # a run that was killed had read it
            self.layer(index)
        cuts = cuts_of(self._source, index, self._storage, self._device)
        assert self._cut is not None
        assert cuts is not None
        layer = self._cut[1]
        assert isinstance(layer.mlp, Mlp)
        assert isinstance(config.mlp, MlpConfig)
        if part == "up":
            return up_block(layer.mlp.up, config.mlp, place, cuts.up)
        block = down_block(layer.mlp.down, place, cuts.down)
        if place == cuts.down - 1:
            self._cut = None
        return block

    def expert(self, index: int, expert: int, place: int) -> Matrix:
        """Prepare an expert, of which one matrix at a time becomes a record."""
        if self._expert is None or self._expert[:2] != (index, expert):
            self._expert = None
            weights = self._experts.expert(index, expert)
            validate_expert(weights, self._config, index, expert)
            of_rows = self._source.of_expert_rows(index, expert) if isinstance(self._source, RankSource) else None
            self._expert = index, expert, prepare_experts(weights, self._storage, CPU, of_rows)
        matrix = one_expert(self._expert[2][place], 0)
        if place == 1:
            self._expert = None
        return matrix

    def _without_experts(self, index: int) -> LayerWeights:
        weights = self._experts.layer_without_experts(index)
        validate_without_experts(weights, self._config, index)
        return weights

    def block(self, kind: str, first: int) -> Matrix:
        """Return rows of the head or of the table, packed; rows past the vocabulary are zeros."""
        if self._whole is None or self._whole[0] != kind:
            self._whole = None
            self._whole = (kind, *self._matrix(kind))
        _, quantized, bias_V = self._whole
        end = min(first + self.rows, self._config.vocabulary)
        lacking = first + self.rows - end
        cut = quantized.rows(first, end)
        scale_N = None if cut.scale_N is None else functional.pad(cut.scale_N, (0, lacking))
        bias_N = None if bias_V is None else functional.pad(bias_V[first:end].to(torch.float32), (0, lacking))
        block = pack(Quantized(functional.pad(cut.weight_NI, (0, 0, 0, lacking)), self._storage, scale_N), bias_N)
        self._checksums[kind, first] = checksums_of(block)
        return block

    def resident(self) -> Resident:
        config, storage = self._config, self._storage
        for index in _indices(config):
            if index not in self._frequencies:  # a run that was killed had read it
                self._note_frequency(index, self._without_experts(index).attention.rotary_frequency_J)
        kind = "head" if self.tied else "table"
        firsts = range(0, self.rows * self.count, self.rows)
        for first in firsts:
            if (kind, first) not in self._checksums:
                self.block(kind, first)
        checksums = [each for first in firsts for each in self._checksums[kind, first]]
        self._whole = None
        weights = self._source.embedding()
        validate_embedding(weights, config)
        narrow = LinearWeights(weight_NI=weights.token_VW[:1])
        embedding = prepare_embedding(
            type(weights)(
                token_VW=narrow.weight_NI,
                position_PM=weights.position_PM,
                type_YM=weights.type_YM,
                norm=weights.norm,
                projection=weights.projection,
            ),
            config,
            storage,
            CPU,
        )
        head = self._head()
        small = type(head)(norm=head.norm, reduction=head.reduction)
        after = prepare_head(small, config, storage, CPU, tied=embedding.table)
        frequencies = [self._frequencies[index] for index in _indices(config)]
        return Resident(
            projection=embedding.projection,
            position_PM=embedding.position_PM,
            type_YM=embedding.type_YM,
            embedding_norm=embedding.norm,
            rotations=find_rotations(frequencies, config, CPU),
            head_norm=prepared_norm(head.norm, config.final_norm, CPU),
            reduction=after.reduction,
            table_checksum_B=torch.tensor(checksums, dtype=torch.int64),
        )

    def _head(self) -> Any:
        head = self._source.head()
        validate_head(head, self._config)
        return head

    def _matrix(self, kind: str) -> tuple[Quantized, Tensor | None]:
        head = self._head()
        if kind == "head" and head.projection is not None:
            return quantize(head.projection.weight_NI.detach(), self._storage), head.bias_V
        weights = self._source.embedding()
        validate_embedding(weights, self._config)
        return quantize(weights.token_VW.detach(), self._storage), head.bias_V if kind == "head" else None

    def _note_frequency(self, index: int, frequency_J: Tensor | None) -> None:
        self._frequencies[index] = None if frequency_J is None else frequency_J.detach().clone()


class _Layerwise:
    """Reads experts one by one from a source that hands out whole layers, of which it holds one."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._held: tuple[int, LayerWeights] | None = None

    def layer_without_experts(self, index: int) -> LayerWeights:
        return sliced(self._layer(index), slices_without_experts(self._source.config, index))

    def expert(self, index: int, expert: int) -> ExpertWeights:
        named = dict(tensors(self._layer(index)))
        slices = slices_of_expert(self._source.config, index, expert)
        return experts_of({name: named[name][index_of(cuts)] for name, cuts in slices.items()})

    def _layer(self, index: int) -> LayerWeights:
        if self._held is None or self._held[0] != index:
            self._held = None
            self._held = index, self._source.layer(index)
            validate_layer(self._held[1], self._source.config, index)
        return self._held[1]


def checksums_of(block: Matrix) -> list[int]:
    """Return the CRC-32 of each block of U rows of a packed matrix (of float32, of each row), as it is looked up."""
    parts = [part for part in (block.word, block.scale_N, block.scale_BGU, block.min_BGU) if part is not None]
    units = len(block.word)
    found = [0] * units
    for part in parts:
        raw = bytes_of(part)
        size = len(raw) // units
        found = [zlib.crc32(raw[unit * size : (unit + 1) * size], found[unit]) for unit in range(units)]
    return found


def experts_of_layer(source: WeightSource, index: int) -> int:
    """Return how many experts of a layer a source has; a rank's has some of them."""
    if isinstance(source, RankSource):
        return source.experts(index)
    mlp = source.config.layers[index].mlp
    return mlp.router.experts if isinstance(mlp, MoeConfig) else 0


def cuts_of(source: WeightSource, index: int, storage: Storage, device: str = "cpu") -> Blocks | None:
    """Return how a layer is cut; None where it is one record."""
    return blocks_of(source.config.layers[index], source.config.hidden, storage, device)


def mlp_records(source: WeightSource, index: int, storage: Storage, device: str = "cpu") -> Blocks:
    """Return how many records of their own a layer's up and down are; 0 where its first record holds them."""
    return cuts_of(source, index, storage, device) or Blocks(0, 0)


def _padded(inputs: int) -> int:
    return -(-inputs // INT4_GROUP) * INT4_GROUP


def _indices(config: ModelConfig) -> range:
    return range(len(config.layers))
