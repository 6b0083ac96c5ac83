"""Pooling, beside loops over plain numbers and beside torch's own on padded batches, as users of BERT write it."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.reference.pooling import pool, unit_length
from twinfer.spec.config import Pooling

EXACT = 1e-14
"""Largest difference, relative to the largest element: a few roundings of float64 in sums of a dozen terms."""


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@given(seed=st.integers(0, 2**20), tokens=st.integers(1, 12), width=st.integers(1, 9))
def test_pooling_is_what_a_loop_over_numbers_gives(seed: int, tokens: int, width: int) -> None:
    hidden_TM = drawn(seed, tokens, width)
    rows = hidden_TM.tolist()
    mean = [math.fsum(row[element] for row in rows) / tokens for element in range(width)]
    assert difference(pool(hidden_TM, Pooling.MEAN), torch.tensor(mean, dtype=torch.float64)) <= EXACT
    assert pool(hidden_TM, Pooling.CLS).tolist() == rows[0]
    length = math.sqrt(math.fsum(element * element for element in mean))
    unit = torch.tensor([element / length for element in mean], dtype=torch.float64)
    assert difference(unit_length(pool(hidden_TM, Pooling.MEAN)), unit) <= EXACT


@given(seed=st.integers(0, 2**20), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_texts_alone_are_as_a_padded_batch_with_its_mask(seed: int, lengths: list[int]) -> None:
    """Whatever stands in the padding."""
    hidden_NTM = drawn(seed, len(lengths), max(lengths), 7)
    mask_NT1 = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[..., None].double()
    mean_NM = F.normalize((hidden_NTM * mask_NT1).sum(1) / mask_NT1.sum(1))
    texts = [hidden_TM[:length] for hidden_TM, length in zip(hidden_NTM, lengths, strict=True)]
    assert difference(torch.stack([unit_length(pool(text_TM, Pooling.MEAN)) for text_TM in texts]), mean_NM) <= EXACT
    assert torch.equal(torch.stack([pool(text_TM, Pooling.CLS) for text_TM in texts]), hidden_NTM[:, 0])


@given(
    seed=st.integers(0, 2**20),
    exponent=st.integers(-126, 120),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_only_the_direction_counts(seed: int, exponent: int, dtype: torch.dtype) -> None:
    """Vectors have length 1 whose squares would leave the range of floats; zeros stay zeros."""
    x = torch.randint(-8, 9, (6,), generator=torch.Generator().manual_seed(seed)).to(dtype)
    scaled = unit_length(x * 2.0**exponent)
    assert torch.equal(scaled, unit_length(x))
    norm = float(scaled.double().norm())
    assert norm == 0 if not x.any() else abs(norm - 1) <= 4 * torch.finfo(dtype).eps
