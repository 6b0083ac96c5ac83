"""The code of real ranks on a process group that sends nothing, with weights that have a shape only.

So jobs of any size run here, rank by rank: what their calls hand in is what the reference's ledger and the formulas of
`spec.plan` count.
"""

import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from twinfer.compiled.experts import Sorted, sort_by_expert
from twinfer.compiled.path import Mode
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.parallel import experts
from twinfer.parallel.groups import form_groups
from twinfer.parallel.ledger import Call
from twinfer.parallel.path import RankPath
from twinfer.parallel.wire import Wire
from twinfer.reference.parallel.path import ParallelReference
from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.counts import Count, count_of
from twinfer.spec.paper_models import PAPER_MODELS
from twinfer.spec.parallel import Exchange, ParallelConfig, stage_layers
from twinfer.spec.plan import rank_bytes, traffic
from twinfer.spec.shapes import is_buffer
from twinfer.spec.weights import tensors

from ..reference.parallel.drawn import draw_layers, draw_parallel
from ..reference.parallel.test_path import FULL, full_config

META = torch.device("meta")


class Shapes(RandomSource):
    """Weights without numbers."""

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=META, dtype=torch.float64 if is_buffer(name) else torch.float32)


@contextmanager
def joined(parallel: ParallelConfig, rank: int) -> Iterator[Wire]:
    """Be one rank of a job whose others do not exist."""
    with warnings.catch_warnings(action="ignore"):  # the fake group has no timeout to set
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.ranks)
        try:
            yield Wire(form_groups(parallel, "cpu"))
        finally:
            dist.destroy_process_group()


def calls_of(config: ModelConfig, parallel: ParallelConfig, rank: int, tokens: int) -> list[Call]:
    """What one rank hands in, in one call of so many tokens for each data group."""
    with joined(parallel, rank) as wire, torch.no_grad():
        path = RankPath(Shapes(config), wire, compute=torch.float32, device=META, mode=Mode.EAGER)
        path.extend(path.open(parallel.data, tokens), [torch.arange(tokens) % config.vocabulary] * parallel.data)
        return wire.ledger.calls


def assert_reference_counts_the_same(config: ModelConfig, parallel: ParallelConfig, tokens: int) -> None:
    path = ParallelReference(RandomSource(config), parallel)
    path.extend(path.open(parallel.data, tokens), [torch.arange(tokens) % config.vocabulary] * parallel.data)
    for rank in range(parallel.ranks):
        seen = Counter((call.kind.value, call.ranks, call.bytes) for call in calls_of(config, parallel, rank, tokens))
        counted = Counter(
            (call.kind.value, call.ranks, call.bytes[call.ranks.index(rank)])
            for call in path.job.ledger.calls
            if rank in call.ranks
        )
        assert seen == counted, rank


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 4))
@settings(max_examples=3)
def test_drawn_models(seed: int, tokens: int) -> None:
    """Each rank makes the reference's calls, byte for byte, of drawn degrees and dense models."""
    pick = RandomPicker(seed)
    config = draw_layers(pick, pick.integer(1, 3))
    assert_reference_counts_the_same(unrotated(config), draw_parallel(pick, config), tokens)


def test_norms_over_all_heads() -> None:
    assert_reference_counts_the_same(unrotated(full_config()), FULL, 3)


def unrotated(config: ModelConfig) -> ModelConfig:
    """The model without rotary positions: rotations are compared by value, and nothing is sent for them."""
    return replace(
        config, layers=tuple(replace(each, attention=replace(each.attention, rotary=None)) for each in config.layers)
    )


def sent(call: Call) -> Fraction:
    """The bytes that leave a rank: its share of a ring, or what it has for others."""
    ranks = len(call.ranks)
    hops = {
        "all_reduce": Fraction(2 * (ranks - 1), ranks),
        "all_gather": Fraction(ranks - 1),
        "all_to_all": Fraction(ranks - 1, ranks),
        "send": Fraction(1),
    }
    return hops[call.kind.value] * call.bytes


def assert_plan_counts_the_same(name: str, parallel: ParallelConfig, tokens: int, alike: dict[int, int]) -> None:
    """Calls and bytes of all ranks are the plan's. `alike` says how many ranks are like each of these.

    The last rank of a tensor group differs from the others: its piece of the vocabulary is shorter.
    """
    config = PAPER_MODELS[name].config
    total, calls = defaultdict[str, Fraction](Fraction), defaultdict[str, Fraction](Fraction)
    assert sum(alike.values()) == parallel.ranks
    for rank, count in alike.items():
        for call in calls_of(config, parallel, rank, tokens):
            total[call.kind.value] += count * sent(call)
            calls[call.kind.value] += Fraction(count, len(call.ranks))
    planned = traffic(config, parallel, tokens=tokens, compute=torch.float32)
    for kind in total:
        steps = [each for each in planned if each.collective == kind]
        assert total[kind] == sum(each.bytes for each in steps), kind
        assert calls[kind] == sum(each.calls for each in steps), kind
    assert total.keys() == {each.collective for each in planned}


def test_a_dense_model_of_the_paper() -> None:
    alike = {0: 8, 8: 24, 32: 7, 39: 1}
    assert_plan_counts_the_same("lm-530b", ParallelConfig(pipeline=5, tensor=8), 2, alike)


MIXTURES = {
    "8b-moe-128": ParallelConfig(data=32, tensor=4, expert=128),
    "24b-moe-128": ParallelConfig(data=32, tensor=8, expert=128, expert_slices=2),
}


@pytest.mark.parametrize(
    ("name", "exchange"),
    [
        ("24b-moe-128", Exchange.DIRECT),
        ("24b-moe-128", Exchange.COORDINATED),
        ("8b-moe-128", Exchange.HIERARCHICAL),
    ],
)
def test_mixtures_of_the_paper(name: str, exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 tokens choose one of 128 experts each, all different, so every number of rows that ranks exchange is 1.

    Numbers are what is told here, since nothing arrives and shapes hold no choices.
    """

    def in_turns(expert_TK: Tensor, count: int) -> Sorted:
        return sort_by_expert((torch.arange(expert_TK.numel()) % count).view(expert_TK.shape), count)

    def ones_if_numbers(collective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            got = collective(*arguments)
            return torch.ones_like(got) if got.dtype is torch.int64 else got

        return call

    monkeypatch.setattr(experts, "sort_by_expert", in_turns)
    monkeypatch.setattr(Wire, "all_to_all", ones_if_numbers(Wire.all_to_all))
    monkeypatch.setattr(Wire, "all_gather_rows", ones_if_numbers(Wire.all_gather_rows))
    monkeypatch.setattr(Wire, "all_numbers", lambda wire, numbers, group: [[1] * len(numbers)] * len(group))
    parallel = replace(MIXTURES[name], exchange=exchange)
    last = parallel.ranks - 1
    alike = {0: parallel.ranks - parallel.data, last: parallel.data}
    assert_plan_counts_the_same(name, parallel, 128, alike)


@pytest.mark.parametrize("name", [*MIXTURES, "lm-530b"])
def test_bytes_of_what_ranks_read(name: str) -> None:
    """The tensors that a source hands to a rank of a job on the paper's GPUs are as many bytes as the plan says."""
    config = PAPER_MODELS[name].config
    parallel = MIXTURES.get(name, ParallelConfig(pipeline=5, tensor=8))
    source = Shapes(config)
    for rank in (0, parallel.ranks // 2 - 1, parallel.ranks - 1):
        place, shard = parallel.place(rank), parallel.shard(rank)
        parts = [
            source.layer(index, shard) for index in stage_layers(len(config.layers), parallel.pipeline)[place.stage]
        ]
        held = Count()
        for part in parts:
            held += count_of({name: tuple(tensor.shape) for name, tensor in tensors(part)})
        ends = {name: tuple(tensor.shape) for name, tensor in tensors(source.embedding(shard))}
        if place.stage == 0:
            held += count_of(ends)
        if place.stage == parallel.pipeline - 1:
            held += count_of({name: tuple(tensor.shape) for name, tensor in tensors(source.head(shard))})
            if place.stage:
                held += count_of({"token_VW": ends["token_VW"]})
        for storage in Storage:
            assert held.bytes(storage) == rank_bytes(config, parallel, rank, storage), rank
