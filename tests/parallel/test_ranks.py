"""A model on real ranks is the model on one: logits, their bits on every rank, and what the ranks send each other.

Everything runs in float64, where only a fault is larger than a rounding.
"""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
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
from twinfer.spec.moe import MoeConfig
from twinfer.spec.parallel import Exchange, ParallelConfig
from twinfer.spec.shard import degrees

from ..families.conftest import AGREEMENT
from ..kinds import note
from .drawn import bytes_of, counted_by_reference, draw_calls, draw_mixture, draw_model, on_one
from .mutants import MUTANTS
from .pool import Pool

EXHAUSTIVE = os.environ.get("HYPOTHESIS_PROFILE") == "exhaustive"
SEEDS = range(400, 440) if EXHAUSTIVE else (409, 421)
"""By default the two that reach the most kinds together (`kinds`): 28 of 38."""
FLOAT64 = torch.float64


def assert_ranks_agree(
    pool: Pool,
    config: ModelConfig,
    seed: int,
    parallel: ParallelConfig,
    storage: Storage,
    *,
    batch: int = 3,
    mutant: str | None = None,
) -> None:
    """Logits are those of one rank to a rounding, the same bits on all ranks; the ledger is the reference's."""
    calls = draw_calls(seed, config.vocabulary, batch=batch)
    case = ("extend", {}) if mutant is None else ("extend_with", {"mutant": mutant})
    given = {"config": config, "seed": seed, "parallel": parallel, "storage": storage, "compute": FLOAT64}
    source = RandomSource(config, seed)
    if mutant is None:
        note("drawn models on real ranks", config, parallel, storage)
    wanted = on_one(source, storage, calls)
    results = pool.run(case[0], calls=calls, **given, **case[1])
    for rank, (logits, _) in enumerate(results):
        assert all(same_bits(*pair) for pair in zip(logits, results[0][0], strict=True)), f"rank {rank} differs"
    for got_BV, want_BV in zip(results[0][0], wanted, strict=True):
        error = float((got_BV - want_BV).abs().max() / want_BV.abs().max())
        assert error <= AGREEMENT, f"{parallel} in {storage}: {error}"
        assert same_bits(got_BV.argmax(-1), want_BV.argmax(-1))
    counted = counted_by_reference(source, parallel, storage, calls)
    for rank, (_, seen) in enumerate(results):
        assert bytes_of(seen) == bytes_of(counted[rank]), f"rank {rank} of {parallel}"


@pytest.mark.parametrize("storage", Storage)
@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_slicing(two: Pool, seed: int, storage: Storage) -> None:
    config = draw_model(seed, wide=storage is Storage.INT4)
    assert 2 in degrees(config, storage)
    assert_ranks_agree(two, config, seed, ParallelConfig(tensor=2), storage)


@pytest.mark.parametrize("parallel", [ParallelConfig(pipeline=2), ParallelConfig(data=2)], ids=["pipeline", "data"])
@pytest.mark.parametrize("seed", SEEDS)
def test_stages_and_data_groups(two: Pool, seed: int, parallel: ParallelConfig) -> None:
    assert_ranks_agree(two, draw_model(seed, layers=2), seed, parallel, Storage.INT8)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=4), ParallelConfig(tensor=2, pipeline=2), ParallelConfig(data=2, tensor=2)],
    ids=["tensor", "pipeline", "data"],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_products_of_degrees(four: Pool, seed: int, parallel: ParallelConfig) -> None:
    assert_ranks_agree(four, draw_model(seed, layers=3), seed, parallel, Storage.BFLOAT16)


MIXTURES_OF_TWO = {
    "tensor": ParallelConfig(tensor=2),
    "expert": ParallelConfig(tensor=2, expert=2),
    "expert of data groups": ParallelConfig(data=2, expert=2),
    "slices": ParallelConfig(tensor=2, expert_slices=2),
}
MIXTURES_OF_FOUR = {
    "expert x slices": ParallelConfig(data=2, tensor=2, expert=2, expert_slices=2),
    "coordinated": ParallelConfig(data=2, tensor=2, expert=4, exchange=Exchange.COORDINATED),
    "hierarchical": ParallelConfig(data=2, tensor=2, expert=4, exchange=Exchange.HIERARCHICAL),
    "direct": ParallelConfig(data=2, tensor=2, expert=4),
    "pipeline": ParallelConfig(pipeline=2, tensor=2, expert=2),
}


@pytest.mark.parametrize("storage", [Storage.FLOAT32, Storage.INT8])
@pytest.mark.parametrize("name", MIXTURES_OF_TWO)
@pytest.mark.parametrize("seed", SEEDS)
def test_mixtures(two: Pool, seed: int, name: str, storage: Storage) -> None:
    parallel = MIXTURES_OF_TWO[name]
    assert_ranks_agree(two, draw_mixture(seed), seed, parallel, storage, batch=parallel.data)


@pytest.mark.parametrize("name", MIXTURES_OF_FOUR)
@pytest.mark.parametrize("seed", SEEDS)
def test_mixtures_by_products_of_degrees(four: Pool, seed: int, name: str) -> None:
    parallel = MIXTURES_OF_FOUR[name]
    assert_ranks_agree(four, draw_mixture(seed), seed, parallel, Storage.INT8, batch=parallel.data)


@pytest.mark.parametrize("name", [*MIXTURES_OF_TWO, *MIXTURES_OF_FOUR])
def test_a_rank_alone_sends_nothing(two: Pool, four: Pool, name: str) -> None:
    """With its wire muted a rank runs prompts and steps while the others do nothing: so ranks compile in turn."""
    pool, parallel = (two, MIXTURES_OF_TWO[name]) if name in MIXTURES_OF_TWO else (four, MIXTURES_OF_FOUR[name])
    config = draw_mixture(400)
    given = {"config": config, "parallel": parallel, "storage": Storage.INT8}
    calls = draw_calls(1, config.vocabulary, batch=parallel.data)
    assert pool.run("muted", calls=calls, **given)[0] == 0


def test_fewer_sequences_than_groups(two: Pool) -> None:
    """One group has none, takes part in every exchange all the same, and sends no rows."""
    assert_ranks_agree(two, draw_mixture(400), 400, ParallelConfig(data=2, expert=2), Storage.INT8, batch=1)


OF_EXPERTS = {
    "all-to-all in another order": ParallelConfig(tensor=2, expert=2),
    "rows not put back": ParallelConfig(tensor=2, expert=2),
    "combined before the return": ParallelConfig(tensor=2, expert=2),
    "residual mix swapped": ParallelConfig(tensor=2, expert=2),
    "slices gathered backwards": ParallelConfig(tensor=2, expert_slices=2),
}
OF_STAGES = {"micro-batches mixed up": ParallelConfig(pipeline=2)}


def assert_caught(pool: Pool, mutant: str, parallel: ParallelConfig) -> None:
    """Without the fault ranks agree, with it they do not; a stage has two layers."""
    config = residual_mixture() if mutant in OF_EXPERTS else everything(2 * parallel.pipeline)
    given = pool, config, 400, parallel, Storage.INT8
    batch = parallel.data if mutant in OF_EXPERTS else 3
    assert_ranks_agree(*given, batch=batch)
    with pytest.raises(AssertionError, match=r"in int8: |differs"):
        assert_ranks_agree(*given, batch=batch, mutant=mutant)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_seeded_faults_are_caught(two: Pool, mutant: str) -> None:
    assert_caught(two, mutant, {**OF_EXPERTS, **OF_STAGES}.get(mutant, ParallelConfig(tensor=2)))


@pytest.mark.skipif(not EXHAUSTIVE, reason="six ranks are many for the default profile")
@pytest.mark.parametrize("mutant", MUTANTS)
def test_seeded_faults_are_caught_at_unequal_degrees(six: Pool, mutant: str) -> None:
    """Of 2 stages of 3 ranks; of experts, 2 data groups of 3 ranks that hold halves of them in thirds."""
    mixed = ParallelConfig(data=2, tensor=3, expert=2, expert_slices=3)
    assert_caught(six, mutant, mixed if mutant in OF_EXPERTS else ParallelConfig(pipeline=2, tensor=3))


def residual_mixture() -> ModelConfig:
    """A mixture in every layer, with an MLP beside the experts, mixed by learned weights."""
    config = draw_mixture(400)
    layer = next(each for each in config.layers if isinstance(each.mlp, MoeConfig))
    assert isinstance(layer.mlp, MoeConfig)
    mlp = replace(layer.mlp, shared=None, shared_gate=False, residual=layer.mlp.expert)
    attention = replace(layer.attention, kv_heads=1)
    return replace(config, layers=(replace(layer, mlp=mlp, attention=attention),) * len(config.layers))


def everything(layers: int) -> ModelConfig:
    """A model that has all that ranks can get wrong: biases, one key/value head, a norm over all heads, 33 tokens."""
    config = replace(draw_model(400, layers=layers), vocabulary=33)

    def full(layer: LayerConfig) -> LayerConfig:
        norm = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
        span = {"qk_norm": norm, "qk_norm_span": QkNormSpan.ALL_HEADS}
        attention = replace(layer.attention, kv_heads=1, qkv_bias=True, output_bias=True, window=None, **span)
        return replace(layer, attention=attention, mlp=replace(layer.mlp, bias=True))

    return replace(config, layers=tuple(map(full, config.layers)))


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(pipeline=2)], ids=["tensor", "pipeline"])
def test_calls_are_the_references_one_by_one(two: Pool, parallel: ParallelConfig) -> None:
    """Of a single sequence, in their order too."""
    config = draw_model(500, layers=2)
    calls = draw_calls(1, config.vocabulary, batch=1)[:2]
    given = {"config": config, "seed": 1, "parallel": parallel, "storage": Storage.FLOAT32}
    seen = [counted for _, counted in two.run("extend", calls=calls, compute=FLOAT64, **given)]
    assert seen == counted_by_reference(RandomSource(config, 1), parallel, Storage.FLOAT32, calls)


def test_every_position(two: Pool) -> None:
    """Logits after each of the new tokens; the last row is what is returned otherwise."""
    config = draw_model(501)
    calls = draw_calls(1, config.vocabulary, batch=3)
    given = {"config": config, "seed": 1, "parallel": ParallelConfig(tensor=2), "storage": Storage.INT8}
    every = two.run("extend", calls=calls, every_position=True, compute=FLOAT64, **given)[1][0]
    last = two.run("extend", calls=calls, compute=FLOAT64, **given)[0][0]
    for call, rows, last_BV in zip(calls, every, last, strict=True):
        assert [len(each_TV) for each_TV in rows] == [len(tokens) for tokens in call]
        for each_TV, last_V in zip(rows, last_BV, strict=True):
            assert len(each_TV) == 0 or relative(each_TV[-1], last_V) <= AGREEMENT


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_sums_are_on_their_way_while_rows_are(two: Pool) -> None:
    """The shared MLP's all-reduce begins before rows leave, and is awaited only when they are back.

    Of parallel sub-layers attention's sum is on its way as well.
    """
    config = draw_mixture(400)
    layer = config.layers[0]
    assert isinstance(layer.mlp, MoeConfig)
    beside = replace(layer.mlp, shared=layer.mlp.expert, shared_gate=False, residual=None)
    layer = replace(layer, mlp=beside, norm_placement=NormPlacement.PRE_NORM, residual=Residual.PARALLEL_SHARED_NORM)
    layer = replace(layer, attention=replace(layer.attention, qk_norm=None))
    config = replace(config, layers=(layer,))
    given = {"config": config, "seed": 1, "parallel": ParallelConfig(tensor=2, expert=2), "tokens": torch.arange(3)}
    for log in two.run("events", **given):
        assert [(step, kind) for step, kind, _ in log] == [
            ("begins", "all_reduce"),  # rows of the token table
            ("is awaited", "all_reduce"),
            ("begins", "all_reduce"),  # attention
            ("begins", "all_reduce"),  # the shared MLP
            *[("begins", "all_to_all"), ("is awaited", "all_to_all")] * 3,  # how many rows, there, and back
            ("is awaited", "all_reduce"),
            ("is awaited", "all_reduce"),
            ("begins", "all_gather"),  # logits
            ("is awaited", "all_gather"),
        ]


def test_ranks_of_one_host_share_memory(two: Pool) -> None:
    """Ranks of one host add up through shared memory what fits into a slot, and the rest through gloo."""
    for small, large, shared in two.run("sums", parallel=ParallelConfig(tensor=2), sizes=(3, 300_000)):
        assert small.tolist() == [3.0] * 3
        assert large.tolist() == [3.0] * 300_000
        assert shared == 1  # the first of the two


RECORDED = {
    "tensor": (draw_model(402, layers=2), ParallelConfig(tensor=2)),
    "pipeline": (draw_model(402, layers=2), ParallelConfig(pipeline=2)),
    "experts in a pipeline": (draw_model(402, layers=2, experts=True), ParallelConfig(pipeline=2)),
    **{f"experts: {name}": (draw_mixture(402), parallel) for name, parallel in MIXTURES_OF_TWO.items()},
}


@pytest.mark.parametrize(("config", "parallel"), RECORDED.values(), ids=RECORDED)
def test_recorded_steps_make_the_same_calls(two: Pool, config: ModelConfig, parallel: ParallelConfig) -> None:
    """Ranks whose steps are recorded make the calls of plain steps, with equal bits whoever has to record anew."""
    calls = [*draw_calls(402, config.vocabulary, batch=3), *draw_calls(403, config.vocabulary, batch=3)[1:2] * 3]
    given = {"config": config, "parallel": parallel, "calls": calls, "storage": Storage.FLOAT32}
    plain = two.run("extend", seed=1, compute=FLOAT64, **given)
    kept, forgotten = (two.run("recorded", forgets=forgets, **given) for forgets in (set(), {4, 6}))
    for rank in range(2):
        assert kept[rank][2] > 0
        assert kept[rank][1] == forgotten[rank][1] == plain[rank][1]
        for place, want_BV in enumerate(plain[rank][0]):
            assert same_bits(kept[rank][0][place], forgotten[rank][0][place])
            assert same_bits(kept[rank][0][place], kept[0][0][place])
            assert relative(kept[rank][0][place], want_BV) <= AGREEMENT
