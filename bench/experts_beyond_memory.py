"""A mixture many times larger than memory: `python -m twinfer.bench.experts_beyond_memory FOLDER [compiled]`.

A model of 8 GB, nearly all of it experts with random weights, is written as a store into FOLDER, and generates within
256 MB beyond the interpreter, as `memory_limit` describes; of the experts it reads those that its tokens choose. With
all weights in memory it takes 8 GB.
"""

import sys

import torch
from torch import Tensor

from ..oracle.models import RandomSource
from ..spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    Storage,
)
from ..spec.moe import MoeConfig, RouterConfig, Score
from ..spec.shapes import layer_shapes
from ..spec.shard import sliced_shapes, slices_of_expert, slices_without_experts
from ..spec.weights import ExpertWeights, LayerWeights, assemble, experts_of
from .memory_limit import Case, command

LIMIT = 256 << 20
"""Bytes beyond the interpreter."""

LAYERS, EXPERTS, TOP_K = 40, 16, 2
HIDDEN, WIDTH = 1024, 2048


def config() -> ModelConfig:
    """Return 40 equal layers of 16 experts with 6.3 million weights each."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    router = RouterConfig(experts=EXPERTS, top_k=TOP_K, score=Score.SOFTMAX_OF_CHOSEN)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=8, kv_heads=2, head_size=64, scale=0.125),
        mlp=MoeConfig(router=router, expert=MlpConfig(width=WIDTH, activation=Activation.SILU, gated=True)),
    )
    return ModelConfig(
        family="random",
        hidden=HIDDEN,
        vocabulary=8192,
        context=64,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        learned_positions=True,
        head=Head.UNTIED,
    )


class Expertwise(RandomSource):
    """Random weights whose experts are drawn one by one, uniformly, which is faster."""

    def layer(self, index: int, shard: object = None) -> LayerWeights:
        assert shard is None
        experts = [dict(self._named(index, expert)) for expert in range(EXPERTS)]
        stacked = {name: torch.cat([each[name] for each in experts]) for name in experts[0]}
        return assemble(LayerWeights, self._without(index) | stacked)

    def layer_without_experts(self, index: int) -> LayerWeights:
        return assemble(LayerWeights, self._without(index))

    def expert(self, index: int, expert: int) -> ExpertWeights:
        return experts_of(self._named(index, expert))

    def _without(self, index: int) -> dict[str, Tensor]:
        shapes = layer_shapes(self.config.layers[index], self.config.hidden)
        return self._drawn(f"layer {index}", sliced_shapes(shapes, slices_without_experts(self.config, index)))

    def _named(self, index: int, expert: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed((index * EXPERTS + expert) * 8)
        shapes = layer_shapes(self.config.layers[index], self.config.hidden)
        held = sliced_shapes(shapes, slices_of_expert(self.config, index, expert))
        return {
            name: torch.empty(shape).uniform_(-1, 1, generator=generator) * (3 / shape[-1]) ** 0.5
            for name, shape in held.items()
        }


def case() -> Case:
    """Return it as `memory_limit` takes it."""
    return Case(
        module="twinfer.bench.experts_beyond_memory",
        source=Expertwise(config(), 5),
        storage=Storage.BFLOAT16,
        limit=lambda store: LIMIT,
        slack=64 << 20,
    )


if __name__ == "__main__":
    command(case(), sys.argv[1:])
