"""A forward pass that fetches a layer, computes with it and releases it, and writes down what that cost.

No layer stays: memory is for tokens, since a layer that stays saves its own fetch only (the paper's section VI-A).
With `prefetch` N, the next N layers are fetched while one is computed with, so N + 1 are held at a time. The program is
sequential; what a real one does at once is written in the ledger as overlapped.

Shapes: B batch, T new tokens, W width of the hidden vectors that the head reads.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...spec.config import ModelConfig
from ...spec.weights import LayerWeights, WeightSource, tensors
from ..cache import KVCache
from ..components import DEFAULT, Components
from ..decoder import DecoderWeights, forward


@dataclass(frozen=True, slots=True)
class Fetch:
    """A layer that was fetched."""

    layer: int
    nbytes: int
    behind: int | None
    """The layer whose computation it overlaps with; None where nothing is computed meanwhile."""


@dataclass(slots=True)
class Ledger:
    """What a pass cost."""

    fetches: list[Fetch] = field(default_factory=list)
    most_held: int = 0
    """Layers in memory at once, at most."""

    @property
    def nbytes(self) -> int:
        """Bytes fetched."""
        return sum(fetch.nbytes for fetch in self.fetches)

    @property
    def overlapped_bytes(self) -> int:
        """Bytes fetched while something was computed."""
        return sum(fetch.nbytes for fetch in self.fetches if fetch.behind is not None)


def streamed_forward(
    token_BT: Tensor,
    caches: tuple[KVCache, ...],
    source: WeightSource,
    config: ModelConfig,
    dtype: torch.dtype,
    ledger: Ledger,
    *,
    prefetch: int,
    components: Components = DEFAULT,
) -> tuple[Tensor, tuple[KVCache, ...]]:
    """Return what `decoder.forward` does, [B, T, W] and the grown caches, with at most prefetch + 1 layers at a time.

    The pass is `decoder.forward` itself, over layers that are fetched as it asks for them.
    """
    weights = DecoderWeights(embedding=source.embedding(), layers=(), head=source.head())
    layers = _Fetched(source, len(config.layers), prefetch, ledger)
    return forward(token_BT, caches, replace(weights, layers=layers), config, dtype, components)  # type: ignore[arg-type]


class _Fetched:
    """Layers in order, of which only those from the current one to `prefetch` further are held."""

    def __init__(self, source: WeightSource, count: int, prefetch: int, ledger: Ledger) -> None:
        self._source, self._count, self._prefetch, self._ledger = source, count, prefetch, ledger
        self._held: dict[int, LayerWeights] = {}

    def __iter__(self) -> "_Fetched":
        self._current = -1
        return self

    def __next__(self) -> LayerWeights:
        self._held.pop(self._current, None)  # release
        computed = self._current = self._current + 1
        if computed == self._count:
            raise StopIteration
        if computed not in self._held:
            self._fetch(computed, behind=None)
        for ahead in range(computed + 1, min(computed + 1 + self._prefetch, self._count)):
            if ahead not in self._held:
                self._fetch(ahead, behind=computed)
        return self._held[computed]

    def _fetch(self, layer: int, behind: int | None) -> None:
        weights = self._held[layer] = self._source.layer(layer)
        nbytes = sum(tensor.nbytes for _, tensor in tensors(weights))
        self._ledger.fetches.append(Fetch(layer, nbytes, behind))
        self._ledger.most_held = max(self._ledger.most_held, len(self._held))
