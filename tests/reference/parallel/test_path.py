"""A dense model on many ranks is the model on one: any degrees, placements, residual forms and storages."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.oracle.trial import same_bits
from twinfer.reference.cache import empty
from twinfer.reference.layer import layer as whole_layer
from twinfer.reference.parallel import job as jobs
from twinfer.reference.parallel import tensor as slicing
from twinfer.reference.parallel import vocabulary
from twinfer.reference.parallel.collectives import all_gather
from twinfer.reference.parallel.generation import generate
from twinfer.reference.parallel.ledger import Collective, Ledger
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.schedule import baseline, dynamic_queue, hybrid
from twinfer.reference.parallel.stage import Stage
from twinfer.reference.parallel.tensor import layer
from twinfer.reference.path import ReferencePath
from twinfer.spec import shard as sharding
from twinfer.spec.config import (
    LayerConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    QkNormSpan,
    Residual,
    Storage,
)
from twinfer.spec.decoder import Decoder
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import ParallelConfig, check_parallel
from twinfer.spec.shard import Shard, degrees, local_layer
from twinfer.spec.weights import LayerWeights, assemble, tensors

from ...families.conftest import AGREEMENT
from ...families.examples import EXHAUSTIVE
from ...kinds import note
from ...shards import shareable
from .drawn import EXACT, IntegerSource, draw_case, draw_layers, draw_parallel, exact_layer

seeds = st.integers(0, 2**31)
FORMS = [(NormPlacement.PRE_NORM, residual) for residual in Residual] + [
    (placement, Residual.SEQUENTIAL) for placement in NormPlacement if placement is not NormPlacement.PRE_NORM
]


@pytest.mark.parametrize(("placement", "residual"), FORMS)
@given(seed=seeds)
@settings(max_examples=5)
def test_a_layer_of_integers(placement: NormPlacement, residual: Residual, seed: int) -> None:
    """Bit for bit the unsharded layer, on every rank; two all-reduces of [1, T, M], or one where both read the same."""
    config = shareable(RandomPicker(seed))
    config = replace(config, layers=(exact_layer(config.layers[0], placement, residual),))
    one, source = config.layers[0], IntegerSource(config, seed, torch.float64)
    x_BTM = torch.randint(-3, 4, (1, 5, config.hidden)).double()
    want_BTM, _ = whole_layer(x_BTM, source.layer(0), one, empty(1, one.attention, torch.float64), EXACT)
    for ranks in degrees(config):
        stage = Stage(0, ParallelConfig(tensor=ranks), Ledger())
        weights_R = [source.layer(0, Shard(rank=rank, ranks=ranks)) for rank in range(ranks)]
        cache_R = [empty(1, local_layer(one, ranks).attention, torch.float64)] * ranks
        got_RBTM, _ = layer([x_BTM] * ranks, weights_R, one, cache_R, stage, EXACT)
        assert all(same_bits(got_BTM, want_BTM) for got_BTM in got_RBTM), ranks
        reductions = 2 if residual is Residual.SEQUENTIAL else 1
        calls = [(call.kind, call.bytes) for call in stage.ledger.calls]
        assert calls == [(Collective.ALL_REDUCE, (x_BTM.nbytes,) * ranks)] * (reductions if ranks > 1 else 0)
        assert sum(stage.ledger.bytes.values()) == reductions * 2 * (ranks - 1) * x_BTM.nbytes


def disagreement(one: Decoder, other: Decoder, seed: int, batch: int = 3) -> float:
    """Largest relative difference of logits over a ragged prompt and two further extensions, some of nothing."""
    generator = torch.Generator().manual_seed(seed)
    held, worst = [path.open(batch, 8) for path in (one, other)], 0.0
    for lengths in ((4, 2, 5, 1, 3), (1, 0, 2, 1, 1), (1, 1, 1, 0, 1)):
        tokens = [torch.randint(one.config.vocabulary, (length,), generator=generator) for length in lengths[:batch]]
        rows = [path.extend(each, tokens, every_position=True) for path, each in zip((one, other), held, strict=True)]
        for a_TV, b_TV in zip(*rows, strict=True):
            assert a_TV.shape == b_TV.shape
            if a_TV.numel():
                worst = max(worst, float((a_TV - b_TV).abs().max() / a_TV.abs().max()))
    return worst


@given(seed=seeds, storage=st.sampled_from(Storage))
@settings(max_examples=300 if EXHAUSTIVE else 15)
def test_drawn_models(seed: int, storage: Storage) -> None:
    """In float64 logits agree to rounding: any degrees, on the same stored weights."""
    config, parallel = draw_case(seed)
    note("dense models in the reference", config, parallel, storage)
    if storage is Storage.INT4:
        width = 64 * parallel.tensor
        config = replace(config, layers=tuple(of_groups(each, width) for each in config.layers))
    source = RandomSource(config, seed)
    one = ReferencePath(source, storage=storage, compute=torch.float64)
    other = ParallelReference(source, parallel, storage=storage, compute=torch.float64)
    assert disagreement(one, other, seed) <= AGREEMENT, parallel


@pytest.mark.parametrize(("placement", "residual"), FORMS)
def test_every_residual_form(placement: NormPlacement, residual: Residual) -> None:
    """With norms that normalize, which differ from one another, and what is added scaled by half."""
    config = shareable(RandomPicker(5))
    form: dict[str, Any] = {"norm_placement": placement, "residual": residual, "residual_scale": 0.5}
    config = replace(config, layers=tuple(replace(config.layers[0], **form) for _ in range(2)))
    source, parallel = RandomSource(config, 5), ParallelConfig(data=2, pipeline=2, tensor=degrees(config)[-1])
    assert parallel.tensor > 2
    one = ReferencePath(source, compute=torch.float64)
    assert disagreement(one, ParallelReference(source, parallel, compute=torch.float64), 5) <= AGREEMENT


def of_groups(each: LayerConfig, width: int) -> LayerConfig:
    attention = replace(each.attention, head_size=64, scale=0.125)
    return replace(each, attention=attention, mlp=replace(each.mlp, width=width))


@given(seed=seeds)
@settings(max_examples=4)
def test_the_oracle(seed: int) -> None:
    """In float32, within the budget of a path, over drawn schedules of open, extend and close."""
    pick = RandomPicker(seed)
    config = draw_layers(pick, pick.integer(1, 2))
    source = RandomSource(config, seed)
    candidate = ParallelReference(source, draw_parallel(pick, config))
    assert_paths_agree(Baseline.of(source), candidate, draw_schedule(pick, config, max_steps=4))


def greedy(path: ReferencePath, prompts: list[Tensor], tokens: int) -> list[list[int]]:
    sequences, last, new = path.open(len(prompts), 8), prompts, [[] for _ in prompts]  # type: ignore[var-annotated]
    for _ in range(tokens):
        last = [row.argmax(keepdim=True) for row in path.extend(sequences, last)]
        for each, token in zip(new, last, strict=True):
            each.append(int(token))
    return new


@given(seed=seeds)
@settings(max_examples=4)
def test_generation_on_every_schedule(seed: int) -> None:
    """The tokens are those of one rank; stage borders carry [1, T, M] down and one token for each sequence back."""
    pick = RandomPicker(seed)
    config = draw_layers(pick, 3)
    tensor = degrees(config)[1]
    parallel = ParallelConfig(data=pick.integer(1, 2), pipeline=pick.integer(2, 3), tensor=tensor)
    source, generator = RandomSource(config, seed), torch.Generator().manual_seed(seed)
    lengths = [pick.integer(1, 5) for _ in range(parallel.data * 4)]
    prompts = [torch.randint(config.vocabulary, (length,), generator=generator) for length in lengths]
    wanted = greedy(ReferencePath(source, compute=torch.float64), prompts, 4)
    for schedule in (
        baseline(parallel.pipeline, 4, 4),
        dynamic_queue(parallel.pipeline, 3, 4),
        hybrid(parallel.pipeline, 4, 2, 4),
    ):
        path = ParallelReference(source, parallel, compute=torch.float64)
        assert generate(path.job, prompts, schedule) == wanted
        sent = sum(sum(call.bytes) for call in path.job.ledger.calls if call.kind is Collective.SEND)
        down = (parallel.pipeline - 1) * tensor * 8 * config.hidden * (sum(lengths) + 3 * len(lengths))
        assert sent == down + tensor * 8 * 4 * len(lengths)


FULL = ParallelConfig(data=3, pipeline=2, tensor=4)
"""Degrees that differ from one another; tensor exceeds the key/value heads of `full_config`."""


def full_config() -> ModelConfig:
    """Biases everywhere, a norm over all heads, 2 key/value heads, a vocabulary that 4 does not divide."""
    config = shareable(RandomPicker(3))
    norm = NormConfig(kind=NormKind.LAYER, epsilon=1e-5)
    one = config.layers[0]
    attention = replace(
        one.attention, heads=12, kv_heads=2, qkv_bias=True, output_bias=True, qk_norm=norm, qkv_clip=None
    )
    attention = replace(attention, qk_norm_span=QkNormSpan.ALL_HEADS)
    mlp = replace(one.mlp, bias=True, width=24)
    layers = tuple(replace(one, attention=attention, mlp=mlp) for _ in range(3))
    return replace(config, layers=layers, vocabulary=37, head_bias=True, logit_softcap=None)


Mutant = Callable[[pytest.MonkeyPatch, ParallelReference], None]


def _bias_on_each_rank(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    for stage in path.job.weights:
        for rank, held in enumerate(stage):
            of_rank_0 = [dict(tensors(each)) for each in stage[rank // 4 * 4].layers]
            layers = [{**of_rank_0[i], **dict(tensors(each))} for i, each in enumerate(held.layers)]
            stage[rank] = replace(held, layers=tuple(assemble(LayerWeights, each) for each in layers))  # type: ignore[index]


def _all_reduce_missing(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    patch.setattr(Stage, "add_up", lambda stage, part_R: list(part_R))


def _heads_of_the_neighbor(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    for stage in path.job.weights:
        queries = [[each.attention.query for each in held.layers] for held in stage]
        for rank, held in enumerate(stage):
            pairs = zip(held.layers, queries[rank ^ 1], strict=True)
            layers = tuple(replace(each, attention=replace(each.attention, query=query)) for each, query in pairs)
            stage[rank] = replace(held, layers=layers)  # type: ignore[index]


def _replicated_heads_by_modulo(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    patch.setattr(sharding, "_among", lambda shard, heads: Shard(rank=shard.rank % heads, ranks=heads))
    again = ParallelReference(RandomSource(path.config), FULL, compute=torch.float64)
    path.job = again.job


def _norm_of_own_heads(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    def alone(x_R: list[Tensor], weights_R: list[Any], config: NormConfig, stage: Stage) -> list[Tensor]:
        return [slicing.DEFAULT.norm(x, weights, config) for x, weights in zip(x_R, weights_R, strict=True)]

    patch.setattr(slicing, "norm_over_ranks", alone)


def _gather_in_the_wrong_order(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    patch.setattr(vocabulary, "all_gather", lambda values, *rest, dim: all_gather(values[::-1], *rest, dim=dim))


def _vocabulary_rounded_down(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    patch.setattr(vocabulary, "_first_token", lambda config, stage, rank: rank % 4 * (config.vocabulary // 4))


def _sequences_mixed_up(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    work = jobs.Job.work
    patch.setattr(jobs.Job, "work", lambda job, index, members, *rest: work(job, index, members[::-1], *rest))


def _caches_of_the_other_stage(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    work = jobs.Job.work

    def crossed(job: Any, index: int, members: range, states: list[Any], x: list[Tensor]) -> list[Tensor]:
        out = work(job, index, members, states, x)
        for each in members:
            first, second = states[each].caches
            if index == 1:
                swapped = tuple((mine[0], *of[1:]) for mine, of in zip(second, first, strict=True))
                states[each] = replace(states[each], caches=(swapped, second))
        return out

    patch.setattr(jobs.Job, "work", crossed)


def _positions_from_zero(patch: pytest.MonkeyPatch, path: ParallelReference) -> None:
    lookup = jobs.embed_over_ranks
    patch.setattr(jobs, "embed_over_ranks", lambda tokens, start, *rest: lookup(tokens, [0] * len(start), *rest))


MUTANTS: list[Mutant] = [
    _bias_on_each_rank,
    _all_reduce_missing,
    _heads_of_the_neighbor,
    _replicated_heads_by_modulo,
    _norm_of_own_heads,
    _gather_in_the_wrong_order,
    _vocabulary_rounded_down,
    _sequences_mixed_up,
    _caches_of_the_other_stage,
    _positions_from_zero,
]


@pytest.mark.parametrize("mutant", [None, *MUTANTS], ids=lambda each: each.__name__.strip("_") if each else "none")
def test_mutants_are_caught(mutant: Mutant | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each moves logits by more than a thousand times what is allowed; without one they agree."""
    config = replace(full_config(), learned_positions=True)
    source = RandomSource(config)
    path = ParallelReference(source, FULL, compute=torch.float64)
    if mutant is not None:
        mutant(monkeypatch, path)
    seen = disagreement(ReferencePath(source, compute=torch.float64), path, 0, batch=5)
    assert seen <= AGREEMENT if mutant is None else seen > 1000 * AGREEMENT


@pytest.mark.parametrize(
    ("degrees_given", "message"),
    [
        ({"tensor": 5}, r"tensor is 5, but layer 0 has 12 query heads, .* nearest number that can share it is 4 or 6$"),
        ({"pipeline": 4}, r"pipeline is 4, but the model has 3 layers .* nearest that works is 3"),
        ({"data": 0}, r"ParallelConfig\.data is 0; it must be at least 1"),
        (
            {"data": 3, "tensor": 2, "expert": 4},
            r"4 \* 1, but a stage has data \* tensor = 6 ranks, .* is 3 \* 1",
        ),
    ],
)
def test_degrees_that_do_not_work_are_refused(degrees_given: dict[str, int], message: str) -> None:
    """Before anything is read, with the nearest that works."""

    class Unreadable(RandomSource):
        def embedding(self, shard: Shard | None = None) -> Any:
            raise AssertionError("read")

    with pytest.raises(RequestError, match=message):
        ParallelReference(Unreadable(full_config()), ParallelConfig(**degrees_given))
    check_parallel(full_config(), FULL)
