"""Small models in stores, and what must hold of them."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twinfer.compiled.packing import ROWS
from twinfer.compiled.path import CompiledPath
from twinfer.offload import form, kv_blocks, kv_file, kv_stream
from twinfer.offload.building import build
from twinfer.offload.direct import opened
from twinfer.offload.path import OffloadPath
from twinfer.offload.store import Store, open_store
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    Storage,
)
from twinfer.spec.decoder import Decoder
from twinfer.spec.moe import MoeConfig, RouterConfig, Score

BUDGET = 50 << 20


def config(layers: int = 5, head: Head = Head.UNTIED) -> ModelConfig:
    """Return a model of equal layers whose head is several blocks."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, scale=0.5),
        mlp=MlpConfig(width=32, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family="random",
        hidden=24,
        vocabulary=1500,
        context=64,
        layers=(layer,) * layers,
        final_norm=norm,
        learned_positions=True,
        head=head,
    )


def wide_config(placement: NormPlacement = NormPlacement.SANDWICH_NORM) -> ModelConfig:
    """Return layers of which attention is 4 M^2 weights, up 20 M^2 and down 10 M^2, M = 4 U."""
    small = config(layers=3)
    layer = small.layers[0]
    attention = replace(layer.attention, heads=4, kv_heads=4, head_size=16)
    mlp = replace(layer.mlp, width=40 * ROWS)
    each = replace(layer, attention=attention, mlp=mlp, norm_placement=placement)
    return replace(small, hidden=4 * ROWS, layers=(each,) * 3)


def mixtures(layers: int = 4, experts: int = 6, top_k: int = 3) -> ModelConfig:
    """Return the small model with experts in all layers but the first."""
    model = config(layers)
    router = RouterConfig(experts=experts, top_k=top_k, score=Score.SOFTMAX_OF_CHOSEN)

    def mixture(layer: LayerConfig) -> LayerConfig:
        assert isinstance(layer.mlp, MlpConfig)
        return replace(layer, mlp=MoeConfig(router=router, expert=layer.mlp))

    first, *others = model.layers
    return replace(model, layers=(first, *map(mixture, others)))


def built(source: RandomSource, folder: Path, storage: Storage = Storage.FLOAT32) -> Store:
    build(source, folder, storage, model={"name": "m"}, files={}, identity=1, report=lambda line: None)
    return open_store(folder)


def schedule(model: ModelConfig, batch: int, seed: int) -> list[list[Tensor]]:
    """Return what a batch is extended by: prompts of several lengths, two steps, and a step of some."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [[(row * 3 + seed) % 9 + 1 for row in range(batch)], [1] * batch, [1] * batch, [0] * (batch - 1) + [2]]
    return [[torch.randint(model.vocabulary, (n,), generator=generator) for n in each] for each in lengths]


def steps_of(model: ModelConfig, batch: int, seed: int) -> list[list[Tensor]]:
    """Return two schedules, one after the other."""
    return list(itertools.chain(*(schedule(model, batch, seed + each) for each in range(2))))


def logits(decoder: Decoder, steps: Sequence[Sequence[Tensor]], *, every: bool = False) -> list[Tensor]:
    """Run the steps; returns all logits in order."""
    sequences = decoder.open(len(steps[0]), 30)
    found: list[Tensor] = []
    for step in steps:
        if every:
            found += decoder.extend(sequences, step, every_position=True)
        else:
            found.append(decoder.extend(sequences, step))
    sequences.close()
    return found


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Return whether all are equal to the bit."""
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def resident(source: RandomSource, storage: Storage = Storage.FLOAT32) -> CompiledPath:
    return CompiledPath(source, storage=storage, mode="eager")


def offloaded(store: Store, model: ModelConfig, budget: int = BUDGET) -> OffloadPath:
    return OffloadPath(store, model, budget=budget, mode="eager")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny_pages(patch: pytest.MonkeyPatch) -> None:
    """Let files be read at any byte, so that blocks of few tokens are tried."""
    for module in (form, kv_stream, kv_blocks):
        patch.setattr(module, "PAGE", 1)
    patch.setattr(kv_file, "opened", lambda path, flags: opened(path, flags, direct=False))
