"""What belongs to a rank: its elements, numbers of ranks that work, and sub-layers that the ranks compute together."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_encoder_config
from twinfer.reference.cache import empty
from twinfer.reference.components import DEFAULT
from twinfer.reference.layer import self_attention
from twinfer.spec.config import LayerConfig, ModelConfig, QkNormSpan, Storage
from twinfer.spec.errors import RequestError, TwinferError
from twinfer.spec.shard import Shard, check_ranks, degrees, local_layer
from twinfer.spec.weights import LayerWeights

from ..families.conftest import AGREEMENT
from ..shards import assert_shards_join, shareable

seeds = st.integers(0, 2**31)


@given(seed=seeds)
@settings(max_examples=30)
def test_ranks_hold_their_elements(seed: int) -> None:
    """Of any drawn model, with all of its conventions; an encoder is one as well, where ranks can share it."""
    assert len(assert_shards_join(RandomSource(shareable(RandomPicker(seed)), seed))) >= 2
    assert 1 in assert_shards_join(RandomSource(draw_encoder_config(RandomPicker(seed)), seed))


@given(seed=seeds)
@settings(max_examples=30)
def test_ranks_compute_a_layer_together(seed: int) -> None:
    """What the ranks compute of their shares, with the rank-local config, adds up to what the layer computes.

    (A norm over all heads is the one thing that a rank cannot compute by itself.)
    """
    config = shareable(RandomPicker(seed))
    layer = config.layers[0]
    assume(layer.attention.qk_norm is None or layer.attention.qk_norm_span is QkNormSpan.HEAD)
    source = RandomSource(config, seed, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x_BTM = torch.randn(1, 5, config.hidden, generator=generator, dtype=torch.float64)
    whole = up_to_reductions(x_BTM, source.layer(0), layer)
    for ranks in degrees(config):
        shares = [source.layer(0, Shard(rank=rank, ranks=ranks)) for rank in range(ranks)]
        of_ranks = [up_to_reductions(x_BTM, share, local_layer(layer, ranks)) for share in shares]
        for terms, result in zip(zip(*of_ranks, strict=True), whole, strict=True):
            scale = sum(term.abs() for term in terms).max()
            assert float((sum(terms) - result).abs().max()) <= AGREEMENT * float(scale), f"{ranks} ranks"


def up_to_reductions(x_BTM: Tensor, weights: LayerWeights, layer: LayerConfig) -> tuple[Tensor, Tensor]:
    """What attention and MLP each add to the stream, of the same input."""
    cache = empty(1, layer.attention, torch.float64)
    attended_BTM, _ = self_attention(x_BTM, weights.attention, layer.attention, cache, DEFAULT)
    return attended_BTM, DEFAULT.mlp(x_BTM, weights.mlp, layer.mlp, linear=DEFAULT.linear)


def of_sizes(heads: int, kv_heads: int, width: int, vocabulary: int = 1000, head_size: int = 64) -> ModelConfig:
    config = shareable(RandomPicker(0))
    (layer, *_) = config.layers
    attention = replace(layer.attention, heads=heads, kv_heads=kv_heads, head_size=head_size)
    layers = (replace(layer, attention=attention, mlp=replace(layer.mlp, width=width)),)
    return replace(config, layers=layers, vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("config", "storage", "right"),
    [
        (of_sizes(9, 3, 1536), None, (1, 3)),  # SmolLM2-135M; 9 does not divide its MLP
        (of_sizes(32, 8, 11008), None, (1, 2, 4, 8, 16, 32)),
        (of_sizes(32, 8, 11008), Storage.INT8, (1, 2, 4, 8, 16, 32)),
        (of_sizes(32, 8, 11008), Storage.INT4, (1, 2, 4)),  # 11008 is 172 groups
        (of_sizes(12, 4, 48, head_size=32), Storage.INT4, (1,)),
        (of_sizes(12, 6, 48), None, (1, 2, 3, 6, 12)),  # on 4 ranks, 3 query heads would read 1.5 key/value heads
        (of_sizes(12, 1, 40), None, (1, 2, 4)),
        (of_sizes(4, 4, 4, vocabulary=9), None, (1, 2)),  # on 4 ranks, 3 + 3 + 3 + 0 tokens
        (of_sizes(4, 4, 4, vocabulary=10), None, (1, 2, 4)),
    ],
)
def test_degrees(config: ModelConfig, storage: Storage | None, right: tuple[int, ...]) -> None:
    assert degrees(config, storage) == right
    for ranks in right:
        check_ranks(config, ranks, storage)


@pytest.mark.parametrize(
    ("config", "ranks", "storage", "message"),
    [
        (
            of_sizes(9, 3, 1536),
            2,
            None,
            "ranks is 2, but layer 0 has 9 query heads, .* it is 1 or 3$",
        ),
        (of_sizes(9, 3, 1536), 7, None, "9 query heads, .* the nearest number that can share it is 3"),
        (of_sizes(12, 6, 48), 4, None, "6 key/value heads, which neither divide by it nor it by them; .* is 3"),
        (of_sizes(12, 1, 40), 12, None, "an MLP of width 40, which does not divide by it; .* is 4"),
        (of_sizes(4, 4, 4, vocabulary=9), 4, None, "of 9 tokens in pieces of 3 the last rank would get none; .* is 2"),
        (of_sizes(32, 8, 11008), 8, Storage.INT4, "down has 11008 columns, so each rank would hold 1376, .* of 64"),
        (of_sizes(12, 4, 768, head_size=40), 4, Storage.INT4, "attention output has 480 columns, .* it is 1"),
        (of_sizes(32, 8, 11008), 0, None, "ranks is 0; it must be at least 1"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    config: ModelConfig, ranks: int, storage: Storage | None, message: str
) -> None:
    """With the nearest number that can share it."""
    with pytest.raises(RequestError, match=message):
        check_ranks(config, ranks, storage)
    if storage is None and ranks:
        with pytest.raises(RequestError, match=message):
            RandomSource(config).layer(0, Shard(rank=0, ranks=ranks))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 0), (2, 2), (-1, 2), (0, -1)])
def test_shards_that_do_not_exist_are_refused(rank: int, ranks: int) -> None:
    with pytest.raises(TwinferError, match=rf"Shard\.ranks? is {rank if ranks > 0 else ranks}; "):
        Shard(rank=rank, ranks=ranks)
