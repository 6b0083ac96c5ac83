"""A rank's share of a model as a model of its own, so that a store is built of it like of any other.

Its config has the rank's heads, widths and piece of the vocabulary; what only rank 0 adds is zeros elsewhere, and the
last piece of the vocabulary is filled up with rows of zeros, as the parallel path prepares it (`parallel.weights`). Of
an int8 matrix that is cut by columns, scales belong to whole rows. The ranks of a job find these together; here the
other ranks' columns are read as well, once for all ranks whose stores are built one after the other.

Shapes: N rows, E experts of a rank, I inputs.
"""

from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from ..compiled.packing import AbsmaxOfRows, row_absmax
from ..parallel.weights import embedding_share, head_share, layer_share, local_config
from ..spec.config import ModelConfig, Storage
from ..spec.moe import MoeConfig
from ..spec.parallel import ParallelConfig
from ..spec.shard import Shard, index_of, slices_of_expert, slices_without_experts
from ..spec.weights import (
    EmbeddingWeights,
    ExpertWeights,
    HeadWeights,
    LayerWeights,
    WeightSource,
    experts_of,
    sliced,
    tensors,
)

_CUT_BY_COLUMNS = tuple(
    f"{part}.weight_NI" for part in ("attention.output", "mlp.down", "mlp.shared.down", "mlp.residual.down")
)
"""In the order in which they are prepared."""

_OF_EXPERTS = "mlp.experts.down.weight_ENI"

WholeRows = dict[tuple[int, str, int], Tensor]
"""The absmax of whole rows by layer, matrix, and the place of the ranks that hold its experts, as far as found."""


class RankSource:
    """Implements `twinfer.spec.weights.ExpertwiseSource` for the share of a rank; it holds one layer at most."""

    def __init__(
        self, source: WeightSource, parallel: ParallelConfig, rank: int, storage: Storage, whole_rows: WholeRows
    ) -> None:
        """`rank` is one of the first stage, whose layers are taken to be all; `whole_rows` is filled on the way."""
        self._source, self._parallel, self._storage, self._whole_rows = source, parallel, storage, whole_rows
        self._shard, self._place = parallel.shard(rank), parallel.place(rank)
        self._piece = -(-source.config.vocabulary // parallel.tensor)
        self._held: tuple[int, LayerWeights] | None = None
        whole = local_config(source.config, replace(parallel, pipeline=1), 0)
        self.config = replace(whole, vocabulary=self._piece)

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        assert shard is None
        return embedding_share(self._source, self._shard, self._piece)

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        assert shard is None
        if self._held is None or self._held[0] != index:
            self._held = None
            self._held = index, layer_share(self._source, index, self._shard)
        return self._held[1]

    def head(self, shard: Shard | None = None) -> HeadWeights:
        assert shard is None
        self._held = None
        return head_share(self._source, self._shard, self._piece)

    def layer_without_experts(self, index: int) -> LayerWeights:
        return sliced(self.layer(index), slices_without_experts(self.config, index))

    def expert(self, index: int, expert: int) -> ExpertWeights:
        """Return one of the experts that the rank holds, counted from 0."""
        named = dict(tensors(self.layer(index)))
        slices = slices_of_expert(self.config, index, expert)
        return experts_of({name: named[name][index_of(cuts)] for name, cuts in slices.items()})

    def experts(self, index: int) -> int:
        """Return how many experts of a layer the rank holds."""
        mlp = self.config.layers[index].mlp
        return mlp.router.experts // self._parallel.expert if isinstance(mlp, MoeConfig) else 0

    def of_rows(self, index: int) -> AbsmaxOfRows | None:
        """Return what finds the absmax of whole rows while a layer is prepared; None where all rows are whole."""
        if self._storage is not Storage.INT8 or self._parallel.tensor == 1:
            return None
        held = dict(tensors(self.layer(index)))
        names = iter([name for name in _CUT_BY_COLUMNS if name in held])
        return lambda absmax_N: self._whole(index, next(names), 0)

    def of_expert_rows(self, index: int, expert: int) -> AbsmaxOfRows | None:
        """Do the same for one of the rank's experts, whose rows are filled up with rows of zeros."""
        if self._storage is not Storage.INT8 or self._parallel.expert_slices == 1:
            return None

        def whole(absmax_N: Tensor) -> Tensor:
            of_expert_N = self._whole(index, _OF_EXPERTS, self._place.expert).view(self.experts(index), -1)[expert]
            return functional.pad(of_expert_N, (0, len(absmax_N) - len(of_expert_N)))

        return whole

    def _whole(self, index: int, name: str, place: int) -> Tensor:
        if (index, name, place) not in self._whole_rows:
            for rank in range(self._parallel.stage_ranks):
                self._note_rows(index, rank)
        return self._whole_rows[index, name, place].clone()

    def _note_rows(self, index: int, rank: int) -> None:
        """Note the absmax of a rank's columns, where they exceed those of others."""
        held = dict(tensors(layer_share(self._source, index, self._parallel.shard(rank))))
        for name in (*_CUT_BY_COLUMNS, _OF_EXPERTS):
            if name in held:
                key = index, name, self._parallel.place(rank).expert if name == _OF_EXPERTS else 0
                absmax_N = row_absmax(held[name].detach().flatten(0, -2))
                self._whole_rows[key] = torch.maximum(self._whole_rows.get(key, absmax_N), absmax_N)


class NoWeights:
    """A `WeightSource` in name, for a path that reads its weights elsewhere."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def embedding(self, shard: Shard | None = None) -> NoReturn:
        raise AssertionError("the weights are in a store")

    def layer(self, index: int, shard: Shard | None = None) -> NoReturn:
        raise AssertionError("the weights are in a store")

    def head(self, shard: Shard | None = None) -> NoReturn:
        raise AssertionError("the weights are in a store")
