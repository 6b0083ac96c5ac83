"""Models without roundings: integers throughout, small enough that float32 or float64 holds every partial sum.

Each token sees itself only, so that attention returns its value; norms are left out. Every row of a matrix has the
scale 1 in its storage: of int8 the absmax is 127, of int4 each group reaches from -7 to 8. What brings this about
stands in dead columns, which are multiplied by zero: the first two of every 64 elements of hidden vectors, heads and
MLPs are never written. So a rank that took scales from its own columns would round what it holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from twinfer.compiled import layers
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import (
    INT4_GROUP,
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
from twinfer.spec.moe import MoeConfig, router

_LIVE = 3
"""Weights of a row that are not zero, dead ones aside."""


def exact_config(layers: int, *, gated: bool = False, experts: bool = False) -> ModelConfig:
    mlp = MlpConfig(width=4 * INT4_GROUP, activation=Activation.RELU, gated=gated, bias=True)
    mixture = MoeConfig(router=router("mixtral", experts=4, top_k=2), expert=mlp)
    attention = AttentionConfig(
        heads=4, kv_heads=2, head_size=INT4_GROUP, scale=0.125, window=1, qkv_bias=True, output_bias=True
    )
    norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
    layer = LayerConfig(norm=norm, attention=attention, mlp=mixture if experts else mlp)
    return ModelConfig(
        family="exact",
        hidden=INT4_GROUP + 6,
        vocabulary=33,
        context=64,
        layers=(layer,) * layers,
        final_norm=None,
        learned_positions=False,
        head=Head.UNTIED,
    )


class ExactSource(RandomSource):
    """Integer weights that a storage keeps as they are."""

    def __init__(self, config: ModelConfig, seed: int, storage: Storage) -> None:
        super().__init__(config, seed)
        self._storage = storage

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = self._normal(part, name, shape)
        if not name.endswith(("weight_NI", "weight_ENI", "token_VW")):
            whole = (2 * drawn).round().clamp(-3, 3)
            return whole * (torch.arange(shape[-1]) % INT4_GROUP > 1) if name.endswith(("bias_N", "bias_EN")) else whole
        of_rows = self._storage is Storage.INT8  # and not of each group of them
        ends, reach = ((127.0, -127.0), shape[-1]) if of_rows else ((8.0, -7.0), INT4_GROUP)
        dead = torch.arange(shape[-1]) % INT4_GROUP < 2
        size = drawn.masked_fill(dead, 0).abs()
        size_of_column = 1 + torch.arange(shape[-1]) % 3  # unequal, so that scales of a slice do not fit by chance
        small = drawn.sign() * size_of_column * (size >= size.topk(_LIVE, -1).values[..., -1:])
        if name == "token_VW":
            for first in range(0, shape[-1], reach):  # x itself: dead columns stay zero, the scale is of live ones
                small[:, first + 2], small[:, first + 3] = ends
            return small
        written = torch.arange(shape[-2]) % INT4_GROUP > 1
        small = small * (written[:, None] if part != "head" else 1)
        for first in range(0, shape[-1], reach):
            small[..., first], small[..., first + 1] = ends
        return small


@contextmanager
def without_norms() -> Iterator[None]:
    def same(x_TM: Tensor, *_: object) -> Tensor:
        return x_TM

    with patch.object(layers, "norm", same):
        yield
