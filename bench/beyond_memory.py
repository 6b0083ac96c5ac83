"""A model many times larger than memory, under a hard limit: `python -m twinfer.bench.beyond_memory FOLDER [compiled]`.

A model of equal layers with random weights is written as a store into FOLDER, and generates within a 25th of its
weights beyond the interpreter, as `memory_limit` describes.
"""

import sys

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
from .memory_limit import Case, command

RATIO = 25
"""The weights' bytes over the limit beyond the interpreter."""

LAYERS = 120


def config() -> ModelConfig:
    """Return 120 equal layers of 4.2 million weights each."""
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(
        norm=norm,
        attention=AttentionConfig(heads=8, kv_heads=8, head_size=64, scale=0.125),
        mlp=MlpConfig(width=2048, activation=Activation.SILU, gated=True),
    )
    return ModelConfig(
        family="random",
        hidden=512,
        vocabulary=32768,
        context=64,
        layers=(layer,) * LAYERS,
        final_norm=norm,
        learned_positions=True,
        head=Head.UNTIED,
    )


def case() -> Case:
    """Return it as `memory_limit` takes it."""
    return Case(
        module="twinfer.bench.beyond_memory",
        source=RandomSource(config(), 5),
        storage=Storage.FLOAT32,
        limit=lambda store: store.nbytes // RATIO,
        slack=24 << 20,
    )


if __name__ == "__main__":
    command(case(), sys.argv[1:])
