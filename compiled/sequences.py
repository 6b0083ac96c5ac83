"""The static cache of a batch of sequences: who owns which slots, and what happens past the capacity.

Every layer has one tensor for keys and one for values, [B * C, K, D]; sequence b keeps position p in slot b * C + p.
Growing copies each sequence's slots to the place that the new capacity gives it:

    B = 2, C = 2 -> 4: slots 0 1 2 3 go to 0 1 4 5

Shapes: B sequences, C capacity, K key/value heads, D head size, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec.config import AttentionConfig, ModelConfig
from ..spec.errors import RequestError
from .compute import DEFAULT, accumulation_dtype
from .layers import Cache
from .packing import own


class StaticSequences:
    """Implements `twinfer.spec.decoder.Sequences` for the compiled path."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        reserve: int,
        device: torch.device,
        compute: torch.dtype = DEFAULT,
    ) -> None:
        self.owner: object = None
        self.capacity = max(2, reserve)  # a graph's S is at least 2, and it reads S slots
        slots = batch * self.capacity
        self.caches = tuple(_empty(layer.attention, slots, device, compute) for layer in config.layers)
        self.last_BV = torch.zeros(batch, config.vocabulary, dtype=accumulation_dtype(compute), device=device)
        self._config = config
        self._lengths = [0] * batch
        self._closed = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def close(self) -> None:
        self._closed = True
        self.caches = ()
        self.last_BV = self.last_BV[:0]

    def check_open(self) -> None:
        if self._closed:
            raise RequestError("the sequences are closed; open new ones")

    def make_room(self, longest: int) -> None:
        """Let every sequence hold `longest` tokens: at least double the capacity, up to the context, and copy."""
        if longest <= self.capacity:
            return
        capacity = min(max(longest, 2 * self.capacity), max(2, self._config.context))
        self.caches = tuple(Cache(*(self._moved(old_SKD, capacity) for old_SKD in cache)) for cache in self.caches)
        self.capacity = capacity

    def advance(self, gained: list[int], last_BV: Tensor) -> None:
        """Record that sequences gained tokens, and the logits after their last ones."""
        self._lengths = [length + more for length, more in zip(self._lengths, gained, strict=True)]
        self.last_BV = last_BV

    def _moved(self, old_SKD: Tensor, capacity: int) -> Tensor:
        batch = len(self._lengths)
        new_BCKD = old_SKD.new_zeros(batch, capacity, *old_SKD.shape[1:])
        new_BCKD[:, : self.capacity] = old_SKD.view(batch, self.capacity, *old_SKD.shape[1:])
        return own(new_BCKD.flatten(0, 1))


def _empty(config: AttentionConfig, slots: int, device: torch.device, compute: torch.dtype) -> Cache:
    shape = slots, config.kv_heads, config.head_size
    return Cache(*(torch.zeros(shape, dtype=compute, device=device) for _ in Cache._fields))


def runs(lengths: list[int], most: int) -> Iterator[slice]:
    """Yield runs of texts that follow each other and hold at most so many tokens together; a longer text is alone.

    >>> list(runs([3, 4, 2, 9, 1], 8))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    begin = held = 0
    for index, length in enumerate(lengths):
        if index > begin and held + length > most:
            yield slice(begin, index)
            begin, held = index, 0
        held += length
    if lengths:
        yield slice(begin, len(lengths))
