"""A mixture on many ranks is the mixture on one: every recipe, exchange and slicing; ledgers are closed formulas."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.reference.components import DEFAULT
from twinfer.reference.moe import moe as whole_moe
from twinfer.reference.parallel import expert_slices, experts
from twinfer.reference.parallel.experts import moe
from twinfer.reference.parallel.ledger import Collective, Ledger
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.stage import Stage
from twinfer.reference.path import ReferencePath
from twinfer.reference.routing import Routing
from twinfer.spec.config import Activation, MlpConfig, ModelConfig, Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.moe import ROUTERS, MoeConfig, router
from twinfer.spec.parallel import Exchange, ParallelConfig, check_parallel
from twinfer.spec.weights import MoeWeights

from ...families.conftest import AGREEMENT
from ...families.examples import EXHAUSTIVE
from ...kinds import note
from ...shards import shareable
from .drawn import IntegerSource, draw_mixture_case
from .test_path import disagreement

seeds = st.integers(0, 2**31)
JOBS = [
    ParallelConfig(data=3, tensor=2, expert=2, expert_slices=3),
    ParallelConfig(data=4, tensor=2, expert=4, expert_slices=2),
    ParallelConfig(data=2, tensor=4, expert=8),
    ParallelConfig(data=3, expert_slices=3),
    ParallelConfig(data=4, tensor=2, expert=2, expert_slices=2),
]
"""Degrees that differ; experts in replicas in the last, expert groups that are one tensor group in the first."""


def mixture(recipe: str, seed: int) -> ModelConfig:
    """Two layers, dense and mixture, biases everywhere, with or without an MLP beside the experts."""
    config = shareable(RandomPicker(seed))
    mlp = MlpConfig(width=24, activation=Activation.RELU, gated=bool(seed % 2), bias=True)
    beside = [{}, {"shared": mlp}, {"shared": mlp, "shared_gate": True}, {"residual": mlp}][seed % 4]
    one = config.layers[0]
    one = replace(one, attention=replace(one.attention, heads=12, kv_heads=2))
    moe_config = MoeConfig(router=router(recipe, experts=8, top_k=2), expert=mlp, **beside)  # type: ignore[arg-type]
    return replace(config, layers=(replace(one, mlp=mlp), replace(one, mlp=moe_config)), vocabulary=37)


def shares(source: IntegerSource, parallel: ParallelConfig) -> list[MoeWeights]:
    cut = [source.layer(1, parallel.shard(rank)) for rank in range(parallel.stage_ranks)]
    return [each.mlp for each in cut if isinstance(each.mlp, MoeWeights)]


def even(logit_TE: Tensor, *_: Any) -> Routing:
    """Weights of 1 and 2, and experts that take turns: token t chooses t and t + 3, so all are chosen equally often."""
    token_T = torch.arange(len(logit_TE))
    expert_TK = torch.stack([token_T, token_T + 3], 1) % logit_TE.shape[1]
    return Routing(expert_TK, torch.tensor([1.0, 2.0], dtype=logit_TE.dtype).expand(len(logit_TE), 2))


def differing(parallel: ParallelConfig, lengths: list[int]) -> list[int]:
    """Ranks on which integers do not come out bit for bit as one rank computes them for each tensor group's tokens."""
    config = mixture("switch", 5)
    mlp, source = config.layers[1].mlp, IntegerSource(config, 5, torch.float64)
    weights = source.layer(1).mlp
    assert isinstance(mlp, MoeConfig)
    assert isinstance(weights, MoeWeights)
    generator = torch.Generator().manual_seed(1)
    x_DBTM = [torch.randint(-3, 4, (1, each, config.hidden), generator=generator).double() for each in lengths]
    x_RBTM = [x_DBTM[rank // parallel.tensor] for rank in range(parallel.stage_ranks)]
    stage, components = Stage(0, parallel, Ledger()), replace(DEFAULT, route=even)
    got_RBTM = moe(x_RBTM, shares(source, parallel), mlp, stage, components)
    want_DBTM = [whole_moe(x_BTM, weights, mlp, route=even) for x_BTM in x_DBTM]
    return [rank for rank, got in enumerate(got_RBTM) if not same_bits(got, want_DBTM[rank // parallel.tensor])]


@pytest.mark.parametrize("exchange", Exchange)
@pytest.mark.parametrize("parallel", JOBS, ids=str)
def test_integers(parallel: ParallelConfig, exchange: Exchange) -> None:
    """Bit for bit, also where groups have unequally many tokens, and one has none."""
    assert not differing(replace(parallel, exchange=exchange), [(7 * group) % 9 for group in range(parallel.data)])


@pytest.mark.parametrize("recipe", ROUTERS)
@given(seed=seeds, job=st.sampled_from(JOBS), exchange=st.sampled_from(Exchange), stages=st.integers(1, 2))
@settings(max_examples=3)
def test_every_recipe(recipe: str, seed: int, job: ParallelConfig, exchange: Exchange, stages: int) -> None:
    """Whole models of each router recipe agree to rounding in float64."""
    source = IntegerSourceOfModels(mixture(recipe, seed), seed)
    path = ParallelReference(source, replace(job, exchange=exchange, pipeline=stages), compute=torch.float64)
    assert disagreement(ReferencePath(source, compute=torch.float64), path, seed, batch=5) <= AGREEMENT


@given(seed=seeds, storage=st.sampled_from([Storage.FLOAT32, Storage.BFLOAT16, Storage.INT8]))
@settings(max_examples=200 if EXHAUSTIVE else 8)
def test_drawn_mixtures(seed: int, storage: Storage) -> None:
    """Models with experts agree to rounding in float64 at any degrees, on the same stored weights."""
    config, parallel = draw_mixture_case(seed)
    note("models with experts in the reference", config, parallel, storage)
    source = RandomSource(config, seed)
    one = ReferencePath(source, storage=storage, compute=torch.float64)
    path = ParallelReference(source, parallel, storage=storage, compute=torch.float64)
    assert disagreement(one, path, seed) <= AGREEMENT, parallel


def test_messages_of_each_exchange() -> None:
    """p - 1, G - 1 + p / G - 1 and p / L - 1 peers; between tensor groups PCC has 1 / L of the direct messages."""
    for data, tensor in ((2, 2), (2, 4), (4, 2), (3, 2)):
        p, sent, config = data * tensor, {}, mixture("switch", 4)
        mlp = replace(config.layers[1].mlp, router=router("switch", experts=p, top_k=2))  # type: ignore[type-var]
        config = replace(config, layers=(config.layers[0], replace(config.layers[1], mlp=mlp)))
        assert isinstance(mlp, MoeConfig)
        source, peers = IntegerSource(config, 0, torch.float64), {}
        x_BTM = torch.ones(1, 2 * p, config.hidden, dtype=torch.float64)
        for exchange in Exchange:
            parallel = ParallelConfig(data=data, tensor=tensor, expert=p, exchange=exchange)
            stage, components = Stage(0, parallel, Ledger()), replace(DEFAULT, route=even)
            moe([x_BTM] * p, shares(source, parallel), mlp, stage, components)
            rows = 2 * 2 * p // p  # of every rank for every other
            sent[exchange] = stage.ledger.between(parallel.tensor_groups)
            peers[exchange] = stage.ledger.peers(0)
            exchanged = [call for call in stage.ledger.calls if call.kind is Collective.ALL_TO_ALL]
            if exchange is Exchange.DIRECT:
                assert [call.bytes for call in exchanged] == [
                    (p * size,) * p for size in (8, *(rows * 8 * config.hidden,) * 2)
                ]
        messages = {exchange: count for exchange, (count, _) in sent.items()}
        assert messages[Exchange.DIRECT] == 3 * p * (p - tensor)  # counts, rows and results
        assert messages[Exchange.COORDINATED] * tensor == messages[Exchange.DIRECT]
        assert messages[Exchange.HIERARCHICAL] == 3 * p * (data - 1)
        assert peers[Exchange.DIRECT] == p - 1
        assert peers[Exchange.HIERARCHICAL] == tensor - 1 + data - 1
        assert sent[Exchange.COORDINATED][1] * tensor == sent[Exchange.DIRECT][1]
        assert sent[Exchange.HIERARCHICAL][1] == sent[Exchange.DIRECT][1]


class IntegerSourceOfModels(IntegerSource):
    """Weights of order one, as drawn, for models whose norms and softmaxes round anyway."""

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        return super(IntegerSource, self)._tensor(part, name, shape)


FULL = ParallelConfig(data=4, tensor=2, expert=4, expert_slices=2, exchange=Exchange.COORDINATED)


def _order_swapped(patch: pytest.MonkeyPatch) -> None:
    swap = experts.swap
    calls = iter(range(100))

    def wrong(pieces: Any, stage: Stage) -> Any:
        got = swap(pieces, stage)
        return [each[::-1] for each in got] if next(calls) % 3 == 1 else got

    patch.setattr(experts, "swap", wrong)


def _combined_before_the_return(patch: pytest.MonkeyPatch) -> None:
    swap = experts.swap
    calls = iter(range(100))
    patch.setattr(experts, "swap", lambda pieces, stage: swap(pieces, stage) if next(calls) % 3 < 2 else list(pieces))


def _slices_not_added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(expert_slices, "all_reduce", lambda values, ranks, ledger: list(values))


def _slices_keep_the_first_rows(patch: pytest.MonkeyPatch) -> None:
    gather = expert_slices.all_gather
    patch.setattr(expert_slices, "all_gather", lambda values, ranks, ledger: gather(values[::-1], ranks, ledger))


def _blocks_in_the_order_of_arrival(patch: pytest.MonkeyPatch) -> None:
    gather = experts.gather_blocks

    def wrong(blocks: Any, stage: Stage, lengths: Any) -> Any:
        return [pieces[1:] + pieces[:1] for pieces in gather(blocks, stage, lengths)]

    patch.setattr(experts, "gather_blocks", wrong)


def _bias_of_every_slice(patch: pytest.MonkeyPatch) -> None:
    serve = experts.serve_rows

    def wrong(arrived: Any, count: Any, weights_R: Any, *rest: Any) -> Any:
        block = FULL.expert
        biased = [
            replace(each, down=replace(each.down, bias_EN=weights_R[rank % block].down.bias_EN))
            for rank, each in enumerate(weights_R)
        ]
        return serve(arrived, count, biased, *rest)

    patch.setattr(experts, "serve_rows", wrong)


Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: list[Mutant] = [
    _order_swapped,
    _combined_before_the_return,
    _slices_not_added,
    _slices_keep_the_first_rows,
    _blocks_in_the_order_of_arrival,
    _bias_of_every_slice,
]


@pytest.mark.parametrize("mutant", [None, *MUTANTS], ids=lambda each: each.__name__.strip("_") if each else "none")
def test_mutants_are_caught(mutant: Mutant | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces are of one size, so that what is mixed up is a wrong result and not an error."""
    if mutant is not None:
        mutant(monkeypatch)
    assert bool(differing(FULL, [8] * FULL.data)) == (mutant is not None)


def test_a_swapped_residual_mix_is_caught() -> None:
    """The experts' output weighed as the MLP's beside them, and the other way round, on every rank."""
    source, parallel = IntegerSourceOfModels(mixture("deepseek-v3", 3), 3), replace(FULL, pipeline=2)
    path = ParallelReference(source, parallel, compute=torch.float64)
    one = ReferencePath(source, compute=torch.float64)
    assert disagreement(one, path, 3, batch=5) <= AGREEMENT
    mixtures = [(held, layer.mlp) for held in path.job.weights[1] for layer in held.layers]
    assert len(mixtures) == parallel.stage_ranks
    for rank, (held, mlp) in enumerate(mixtures):
        assert isinstance(mlp, MoeWeights)
        assert mlp.coefficient is not None
        assert mlp.coefficient.bias_N is not None
        swapped = replace(
            mlp.coefficient, weight_NI=mlp.coefficient.weight_NI.flip(0), bias_N=mlp.coefficient.bias_N.flip(0)
        )
        layers = tuple(replace(layer, mlp=replace(mlp, coefficient=swapped)) for layer in held.layers)
        path.job.weights[1][rank] = replace(held, layers=layers)  # type: ignore[index]
    assert disagreement(one, path, 3, batch=5) > 1000 * AGREEMENT


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"data": 3, "expert": 3}, r"expert is 3, but layer 1 has 8 experts, .* nearest that works is 1$"),
        ({"data": 12, "expert": 3}, r"expert is 3, but layer 1 has 8 experts, .* nearest that works is 2$"),
        ({"data": 5, "expert_slices": 5}, r"expert_slices is 5, but layer 1 has experts of width 24, .* works is 1$"),
        ({"data": 20, "expert_slices": 5}, r"expert_slices is 5, but layer 1 has experts of width 24, .* works is 4$"),
        ({"data": 2, "tensor": 2, "expert": 1, "exchange": Exchange.COORDINATED}, "whole tensor groups; .* direct"),
    ],
)
def test_degrees_that_do_not_work_are_refused(degrees: dict[str, Any], message: str) -> None:
    config = mixture("switch", 0)
    with pytest.raises(RequestError, match=message):
        check_parallel(config, ParallelConfig(**degrees))
    dense = replace(config, layers=config.layers[:1])
    with pytest.raises(RequestError, match=r"2 \* 1, but the model has no experts"):
        check_parallel(dense, ParallelConfig(data=2, expert=2))
