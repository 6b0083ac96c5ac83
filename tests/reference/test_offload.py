"""The reference of offload: it changes when things are fetched, never what is computed."""

import itertools
from collections.abc import Hashable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.strategies import drawn
from twinfer.reference.decoder import DecoderWeights, empty_caches, forward
from twinfer.reference.offload import expert_cache, hiding, kv_offload, partitioned
from twinfer.reference.offload.streaming import Ledger, streamed_forward
from twinfer.spec.config import ModelConfig
from twinfer.spec.weights import tensors

traces = st.lists(st.integers(0, 4), min_size=1, max_size=9)
policies = st.sampled_from([expert_cache.least_recently_used, expert_cache.least_frequently_used])


@given(
    config=drawn(lambda pick: draw_model_config(pick, context=20)), seed=st.integers(0, 2**20), ahead=st.integers(0, 3)
)
def test_a_streamed_pass_is_the_whole_pass(config: ModelConfig, seed: int, ahead: int) -> None:
    """To the bit; every layer is fetched once, and no more are held than the prefetch says."""
    source = RandomSource(config, seed)
    token_BT = torch.randint(config.vocabulary, (1, 5), generator=torch.Generator().manual_seed(seed))
    count, dtype = len(config.layers), torch.float32
    whole = DecoderWeights(
        embedding=source.embedding(), layers=tuple(map(source.layer, range(count))), head=source.head()
    )
    ledger = Ledger()
    given = token_BT, empty_caches(1, config, dtype)
    x, caches = streamed_forward(*given, source, config, dtype, ledger, prefetch=ahead)
    expected, grown = forward(*given, whole, config, dtype)
    assert torch.equal(x, expected)
    assert all(torch.equal(a.key_BSKD, b.key_BSKD) for a, b in zip(caches, grown, strict=True))
    assert [fetch.layer for fetch in ledger.fetches] == list(range(count))
    assert ledger.most_held == min(count, ahead + 1)
    sizes = [sum(tensor.nbytes for _, tensor in tensors(layer)) for layer in whole.layers]
    assert ledger.nbytes == sum(sizes)
    assert ledger.overlapped_bytes == (sum(sizes[1:]) if ahead else 0)


@given(
    weights=st.integers(1, 10**9),
    flops=st.sampled_from([1e9, 84e12]),
    bandwidth=st.sampled_from([1e8, 20.5e9]),
    nbytes=st.sampled_from([0.5, 1, 2, 4]),
)
def test_a_fetch_is_hidden_from_the_condition_on(weights: int, flops: float, bandwidth: float, nbytes: float) -> None:
    """One token fewer and the fetch takes longer than the computation; whatever the layer's size."""
    tokens = hiding.hiding_tokens(flops, bandwidth, nbytes)
    fetch = hiding.fetch_s(weights, bandwidth, nbytes)
    assert hiding.compute_s(weights, int(tokens) + 1, flops) >= fetch
    if tokens > 1:
        assert hiding.compute_s(weights, int(tokens * 0.999) - 1, flops) < fetch


@given(devices=st.integers(1, 5), length=st.integers(1, 20))
def test_what_devices_fetch_apart_is_the_whole(devices: int, length: int) -> None:
    """Gathered, in order, and each fetched as much as the others."""
    flat = torch.arange(length)
    parts = [partitioned.partition(flat, devices, device) for device in range(devices)]
    assert torch.equal(partitioned.all_gather(parts, length), flat)
    assert {len(part) for part in parts} == {-(-length // devices)}


@given(pairs=st.integers(1, 4), layers=st.integers(1, 9))
def test_a_pair_never_uses_its_link_at_the_same_time(pairs: int, layers: int) -> None:
    """In no layer both of a pair move, and in two layers that follow each other both do."""
    use = kv_offload.link_use(2 * pairs, layers)
    for devices in use:
        assert sorted(device // 2 for device in devices) == list(range(pairs))
    for first, second in itertools.pairwise(use):
        assert sorted(first + second) == list(range(2 * pairs))


@given(device=st.integers(0, 3), layers=st.integers(1, 9), threshold=st.integers(0, 100))
def test_what_is_moved_is_as_little_as_the_threshold_asks(device: int, layers: int, threshold: int) -> None:
    """What is left fits unless all that may move has moved; and what comes back is what went, in order."""
    moved = kv_offload.moved_layers(device, layers, 10, threshold)
    may = [layer for layer in range(layers) if kv_offload.moves(device, layer)]
    assert moved == may[: len(moved)]
    assert (layers - len(moved)) * 10 <= threshold or moved == may
    assert not moved or (layers - len(moved) + 1) * 10 > threshold
    caches = tuple(range(layers))
    here, host = kv_offload.offload(caches, moved)  # type: ignore[arg-type]
    assert sorted(host) == moved
    assert kv_offload.fetch_back(here, host) == caches  # type: ignore[comparison-overlap]


def _fewest(trace: Sequence[Hashable], capacity: int, held: frozenset[Hashable] = frozenset()) -> int:
    """Return the fewest fetches of any choices, by trying all."""
    if not trace:
        return 0
    first, *others = trace
    if first in held:
        return _fewest(others, capacity, held)
    if len(held) < capacity:
        return 1 + _fewest(others, capacity, held | {first})
    return 1 + min(_fewest(others, capacity, held - {gone} | {first}) for gone in held)


@given(trace=traces, capacity=st.integers(1, 3))
def test_the_optimum_is_the_best_of_all_choices(trace: list[int], capacity: int) -> None:
    """Of everything that could have been evicted at each fetch."""
    assert len(expert_cache.fetches(trace, capacity, expert_cache.optimal)) == _fewest(trace, capacity)


@given(trace=traces, capacity=st.integers(1, 3), policy=policies)
def test_policies_fetch_what_is_not_held(trace: list[int], capacity: int, policy: expert_cache.Policy) -> None:
    """First uses always, nothing when all fit, never less than the optimum; a larger LRU cache never fetches more."""
    fetched = expert_cache.fetches(trace, capacity, policy)
    assert {trace.index(expert) for expert in trace} <= set(fetched)
    assert len(expert_cache.fetches(trace, 5, policy)) == len(set(trace))
    assert len(fetched) >= len(expert_cache.fetches(trace, capacity, expert_cache.optimal))
    recent = expert_cache.least_recently_used
    larger = expert_cache.fetches(trace, capacity + 1, recent)
    assert set(larger) <= set(expert_cache.fetches(trace, capacity, recent))
    assert expert_cache.hit_rate(trace, capacity, policy) == 1 - len(fetched) / len(trace)


@pytest.mark.parametrize(
    ("policy", "trace", "expected"),
    [
        (expert_cache.least_recently_used, "aabc a", [0, 2, 3, 4, 5]),
        (expert_cache.least_frequently_used, "aabca", [0, 2, 3]),
    ],
)
def test_policies_differ_in_what_goes(policy: expert_cache.Policy, trace: str, expected: list[int]) -> None:
    """Two uses of a save it from the one policy and not from the other."""
    assert expert_cache.fetches(trace, 2, policy) == expected
