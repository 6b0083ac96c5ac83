"""What each rank of a job holds: its stage's layers, cut as `spec.shard` says, and the ends of the model.

The first stage has the token table, the last the head; a tied head is the token table, so the last stage has it too.
"""

from dataclasses import dataclass

import torch

from ...spec.config import ModelConfig
from ...spec.parallel import ParallelConfig, stage_layers
from ...spec.shard import embedding_slices, head_slices, layer_slices, local_layer
from ...spec.weights import LayerWeights, sliced
from ..cache import KVCache, empty
from ..decoder import DecoderWeights

Caches = tuple[tuple[tuple[KVCache, ...], ...], ...]
"""Of one sequence: by stage, by rank of its tensor group, by layer of the stage."""


@dataclass(frozen=True, slots=True, eq=False)
class RankWeights:
    """One rank's share of its stage: ends whose other parts belong to other stages are there and not used."""

    ends: DecoderWeights
    """Embedding and head; no layers."""
    layers: tuple[LayerWeights, ...]


def cut(whole: DecoderWeights, config: ModelConfig, parallel: ParallelConfig) -> list[list[RankWeights]]:
    """Cut a whole model for every rank of every stage; each share is made of views."""
    stages = []
    for indices in stage_layers(len(config.layers), parallel.pipeline):
        held = []
        for rank in range(parallel.stage_ranks):
            shard = parallel.shard(rank)
            layers = tuple(sliced(whole.layers[index], layer_slices(config, index, shard)) for index in indices)
            embedding = sliced(whole.embedding, embedding_slices(config, shard))
            head = sliced(whole.head, head_slices(config, shard))
            held.append(RankWeights(DecoderWeights(embedding=embedding, layers=(), head=head), layers))
        stages.append(held)
    return stages


def empty_caches(config: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, device: torch.device) -> Caches:
    """Return caches of no tokens for one sequence."""

    def of_rank(indices: range) -> tuple[KVCache, ...]:
        local = (local_layer(config.layers[index], parallel.tensor) for index in indices)
        return tuple(empty(1, each.attention, dtype, device) for each in local)

    stages = stage_layers(len(config.layers), parallel.pipeline)
    return tuple((of_rank(indices),) * parallel.tensor for indices in stages)
