"""One rank's share of a model, prepared as the compiled path prepares a whole one.

Every rank reads its own rows and columns and nothing else. The stored weights are those of the whole model to the bit:
rows are quantized alone, int4 is cut where groups end, and of an int8 matrix that is cut by columns the ranks find the
absmax of whole rows together, by one all-reduce of maxima.

All ranks of a stage run the same programs, so their shares have the same form: a bias that only rank 0 adds is zeros
elsewhere, and the last piece of a vocabulary that does not divide is filled up with rows of zeros.

Shapes: V vocabulary (of a rank, its piece), W table width, M hidden, N rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..compiled.compute import DEFAULT
from ..compiled.machine import return_freed_memory
from ..compiled.packing import AbsmaxOfRows
from ..compiled.weights import Layer, Model, find_rotations, prepare_embedding, prepare_head, prepare_layer
from ..spec.config import LayerConfig, ModelConfig, Storage
from ..spec.moe import MoeConfig
from ..spec.parallel import ParallelConfig, stage_layers
from ..spec.shard import Shard, local_layer, vocabulary_piece
from ..spec.weights import (
    EmbeddingWeights,
    HeadWeights,
    LayerWeights,
    LinearWeights,
    MlpWeights,
    WeightSource,
    validate_embedding,
    validate_head,
    validate_layer,
)


class Share(NamedTuple):
    """What a rank holds."""

    model: Model
    """Embedding on the first stage, head on the last, and the stage's layers."""
    config: ModelConfig
    """The whole model's, with the layers of this stage as this rank computes them."""
    first_token_1: Tensor
    """The first token of its piece of the vocabulary."""
    tokens: int
    """Tokens of its piece; the last rank's may hold fewer rows than are there."""


def local_config(config: ModelConfig, parallel: ParallelConfig, stage: int) -> ModelConfig:
    """Return the config by which every rank of a stage computes."""
    layers = stage_layers(len(config.layers), parallel.pipeline)[stage]
    shard = parallel.shard(0)
    cut = tuple(local_layer(config.layers[index], shard.ranks, shard.experts) for index in layers)
    return replace(config, layers=cut)


def prepare_share(
    source: WeightSource,
    parallel: ParallelConfig,
    rank: int,
    storage: Storage,
    device: torch.device,
    compute: torch.dtype = DEFAULT,
    *,
    of_rows: AbsmaxOfRows | None = None,
    of_expert_rows: AbsmaxOfRows | None = None,
    on_part: Callable[[], None] = lambda: None,
) -> Share:
    """Read a rank's share, one part at a time; `on_part` is called after each.

    `of_rows` finds the absmax of whole rows from this rank's columns, together with its tensor group, and
    `of_expert_rows` that of experts' rows, together with the ranks that hold other slices of them.
    """
    whole, place = source.config, parallel.place(rank)
    shard = parallel.shard(rank)
    piece = -(-whole.vocabulary // parallel.tensor)
    last = place.stage == parallel.pipeline - 1
    config = local_config(whole, parallel, place.stage)
    embedding = head = None
    if place.stage == 0 or last:
        embedding = prepare_embedding(embedding_share(source, shard, piece), whole, storage, device, compute)
        on_part()
    if last:
        assert embedding is not None
        head = prepare_head(head_share(source, shard, piece), whole, storage, device, compute, tied=embedding.table)
        on_part()
    layers: list[Layer] = []
    frequencies: list[Tensor | None] = []
    indices = stage_layers(len(whole.layers), parallel.pipeline)[place.stage]
    for index, layer in zip(indices, config.layers, strict=True):
        weights = layer_share(source, index, shard)
        completed = {"of_rows": of_rows, "of_expert_rows": of_expert_rows}
        layers.append(prepare_layer(weights, layer, storage, device, compute, **completed))
        frequencies.append(weights.attention.rotary_frequency_J)
        del weights
        return_freed_memory()
        on_part()
    rotations = find_rotations(frequencies, config, device)
    model = Model(embedding if place.stage == 0 else None, tuple(layers), rotations, head, storage, device, compute)
    tokens = vocabulary_piece(whole.vocabulary, shard)
    return Share(model, config, torch.tensor([tokens.start], device=device), len(tokens))


def embedding_share(source: WeightSource, shard: Shard, piece: int) -> EmbeddingWeights:
    """Read a rank's piece of the token table, filled up with zeros to so many rows, and what is beside it."""
    weights = source.embedding(shard)
    validate_embedding(weights, source.config, shard)
    return replace(weights, token_VW=_filled(weights.token_VW, piece))


def head_share(source: WeightSource, shard: Shard, piece: int) -> HeadWeights:
    """Read a rank's piece of the head, likewise."""
    weights = source.head(shard)
    validate_head(weights, source.config, shard)
    if weights.projection is not None:
        projection = replace(weights.projection, weight_NI=_filled(weights.projection.weight_NI, piece))
        weights = replace(weights, projection=projection)
    return weights if weights.bias_V is None else replace(weights, bias_V=_filled(weights.bias_V, piece))


def layer_share(source: WeightSource, index: int, shard: Shard) -> LayerWeights:
    """Read a rank's share of a layer: matrices that are cut by columns have zeros for the bias that only rank 0 has."""
    weights = source.layer(index, shard)
    validate_layer(weights, source.config, index, shard)
    return _with_zero_biases(weights, source.config.layers[index])


def _filled(rows: Tensor, count: int) -> Tensor:
    """Return the rows, and as many rows of zeros as are wanting."""
    if len(rows) == count:
        return rows
    return functional.pad(rows.detach(), (*(0, 0) * (rows.ndim - 1), 0, count - len(rows)))


def _with_zero_biases(weights: LayerWeights, config: LayerConfig) -> LayerWeights:
    if config.attention.output_bias:
        attention = replace(weights.attention, output=_zero_biased(weights.attention.output))
        weights = replace(weights, attention=attention)
    mlp = weights.mlp
    if isinstance(mlp, MlpWeights):
        return replace(weights, mlp=_zero_biased_mlp(mlp)) if config.dense_mlp.bias else weights
    assert isinstance(config.mlp, MoeConfig)
    if config.mlp.shared is not None and config.mlp.shared.bias and mlp.shared is not None:
        mlp = replace(mlp, shared=_zero_biased_mlp(mlp.shared))
    if config.mlp.residual is not None and config.mlp.residual.bias and mlp.residual is not None:
        mlp = replace(mlp, residual=_zero_biased_mlp(mlp.residual))
    down = mlp.experts.down
    if config.mlp.expert.bias and down.bias_EN is None:
        down = replace(down, bias_EN=down.weight_ENI.new_zeros(down.weight_ENI.shape[:2]))
        mlp = replace(mlp, experts=replace(mlp.experts, down=down))
    return replace(weights, mlp=mlp)


def _zero_biased_mlp(mlp: MlpWeights) -> MlpWeights:
    return replace(mlp, down=_zero_biased(mlp.down))


def _zero_biased(linear: LinearWeights) -> LinearWeights:
    if linear.bias_N is not None:
        return linear
    return replace(linear, bias_N=linear.weight_NI.new_zeros(len(linear.weight_NI)))
