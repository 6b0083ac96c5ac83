"""Prompts in pieces that flow through the stages, and pieces of a pair whose sums are on their way in turn.

Most cases cut prompts of a few tokens, by a smaller shortest piece; one cuts as the product does.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from twinfer.oracle.models import RandomSource
from twinfer.oracle.trial import same_bits
from twinfer.reference.parallel.generation import generate as reference_generate
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.schedule import hybrid
from twinfer.spec import parallel as degrees
from twinfer.spec.config import ModelConfig, NormPlacement, Residual, Storage
from twinfer.spec.parallel import PAIRED_PIECE, STAGED_PIECE, ParallelConfig, prompt_pieces

from ..families.conftest import AGREEMENT
from .drawn import Calls, Counted, counted_by_reference, draw_mixture, draw_model, on_one
from .mutants import OF_PIECES
from .pool import Pool
from .test_ranks import EXHAUSTIVE, everything, relative

FLOAT64 = torch.float64


def calls_of(config: ModelConfig, data: int) -> Calls:
    """A prompt for each data group, of unequal lengths, a step, and another extension."""
    generator = torch.Generator().manual_seed(1)
    lengths = [[11 - 4 * group for group in range(data)], [1] * data, [5] * data]
    return [[torch.randint(config.vocabulary, (count,), generator=generator) for count in call] for call in lengths]


def messages(counted: Counted) -> Counter[tuple[str, tuple[int, ...], int]]:
    """The calls that hand in something."""
    return Counter(each for each in counted if each[2])


def assert_in_pieces(
    pool: Pool,
    config: ModelConfig,
    parallel: ParallelConfig,
    calls: Calls,
    shortest: int = 2,
    mutant: str | None = None,
) -> None:
    """Logits are those of one rank to a rounding, the same bits on all ranks; messages are the reference's."""
    given = {"config": config, "seed": 1, "parallel": parallel, "storage": Storage.INT8, "compute": FLOAT64}
    results = pool.run("extend_in_pieces", shortest=shortest, mutant=mutant, calls=calls, **given)
    for logits, _ in results:
        assert all(same_bits(*pair) for pair in zip(logits, results[0][0], strict=True)), "a rank differs"
    wanted = on_one(RandomSource(config, 1), Storage.INT8, calls)
    worst = max(relative(*pair) for pair in zip(results[0][0], wanted, strict=True))
    assert worst <= AGREEMENT, f"logits are off by {worst}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STAGED_PIECE", "PAIRED_PIECE"):
            patch.setattr(degrees, name, shortest)
        counted = counted_by_reference(RandomSource(config, 1), parallel, Storage.INT8, calls)
    for rank, (_, seen) in enumerate(results):
        assert messages(seen) == messages(counted[rank]), f"messages of rank {rank}"


OF_TWO = [ParallelConfig(pipeline=2), ParallelConfig(tensor=2)]
OF_FOUR = [ParallelConfig(pipeline=2, tensor=2), ParallelConfig(pipeline=2, data=2), ParallelConfig(pipeline=4)]
OF_EXPERTS = [ParallelConfig(pipeline=2, data=2, expert=2), ParallelConfig(pipeline=2, tensor=2, expert=2)]


@pytest.mark.parametrize("parallel", OF_TWO, ids=["pipeline", "tensor"])
def test_two_ranks(two: Pool, parallel: ParallelConfig) -> None:
    assert_in_pieces(two, everything(2), parallel, calls_of(everything(2), parallel.data))


@pytest.mark.parametrize("parallel", OF_FOUR, ids=["pipeline and tensor", "pipeline and data", "pipeline"])
def test_four_ranks(four: Pool, parallel: ParallelConfig) -> None:
    config = draw_model(402, layers=4)
    assert_in_pieces(four, config, parallel, calls_of(config, parallel.data))


@pytest.mark.parametrize("parallel", OF_EXPERTS, ids=["data groups", "tensor group"])
def test_experts_of_four_ranks(four: Pool, parallel: ParallelConfig) -> None:
    """A data group whose prompt has fewer pieces takes part in the exchanges of the other's."""
    config = draw_mixture(400)
    assert_in_pieces(four, config, parallel, calls_of(config, parallel.data))


@pytest.mark.skipif(not EXHAUSTIVE, reason="six ranks are many for the default profile")
def test_six_ranks(six: Pool) -> None:
    assert_in_pieces(six, everything(4), ParallelConfig(pipeline=2, tensor=3), calls_of(everything(4), 1))


OF_TENSOR_GROUPS = {"the other piece of a pair first": ParallelConfig(tensor=2)}
SEEN_IN_LOGITS = [name for name in OF_PIECES if name != "sums awaited at once"]


@pytest.mark.parametrize("mutant", SEEN_IN_LOGITS)
def test_mutants_are_caught(two: Pool, mutant: str) -> None:
    config, parallel = everything(4), OF_TENSOR_GROUPS.get(mutant, ParallelConfig(pipeline=2))
    assert_in_pieces(two, config, parallel, calls_of(config, 1))
    with pytest.raises(AssertionError, match="logits are off by"):
        assert_in_pieces(two, config, parallel, calls_of(config, 1), mutant=mutant)


@pytest.mark.parametrize("parallel", OF_TWO, ids=["pipeline", "tensor"])
def test_pieces_as_they_are_cut(two: Pool, parallel: ParallelConfig) -> None:
    """Of two shortest pieces and a token there are two; calls are the reference's, those of a piece in their order."""
    shortest = STAGED_PIECE if parallel.pipeline > 1 else PAIRED_PIECE
    tokens = 2 * shortest + 1
    config = replace(everything(2), context=1024)
    calls = [[torch.arange(tokens) % config.vocabulary]]
    assert_in_pieces(two, config, parallel, calls, shortest)
    given = {"config": config, "seed": 1, "parallel": parallel, "storage": Storage.FLOAT32, "compute": FLOAT64}
    counted = counted_by_reference(RandomSource(config, 1), parallel, Storage.FLOAT32, calls)
    for rank, (_, seen) in enumerate(two.run("extend", calls=calls, **given)):
        assert prompt_pieces(tokens, parallel) == [shortest + 1, shortest]
        for rows in set(prompt_pieces(tokens, parallel)):
            assert of_piece(seen, rows) == of_piece(counted[rank], rows)
        if parallel.pipeline > 1:
            assert seen == counted[rank]


def of_piece(counted: Counted, rows: int) -> Counted:
    """The calls that hand in whole numbers of elements for so many rows."""
    return [each for each in counted if each[2] and each[2] % (8 * rows) == 0]


def test_a_stage_waits_for_nobody_between_pieces(two: Pool) -> None:
    """The first stage computes piece after piece and sends each on; the second has the next wherever it ends one.

    So each stage does the pieces in their order, as early as it can: the events of the reference's schedule.
    """
    config = everything(4)
    given = {"config": config, "seed": 1, "parallel": ParallelConfig(pipeline=2)}
    prompts = [torch.arange(count) for count in (5, 4, 3)]
    first, second = two.run("computing", prompts=prompts, **given)
    of_layer = [3 if layer.residual is Residual.SEQUENTIAL else 2 for layer in config.layers]
    stages = [[[("computes", len(each))] * sum(of_layer[place : place + 2]) for each in prompts] for place in (0, 2)]
    sends = [("send begins", 4 * config.hidden * len(each)) for each in prompts]
    assert first == [event for each, send in zip(stages[0], sends, strict=True) for event in (*each, send)]
    arrival = [("send begins", 0), ("send is awaited", 0)]
    assert second == [event for each in stages[1] for event in (*arrival, *each)]


@pytest.mark.parametrize("prompts", [4, 6])
def test_generation_follows_the_hybrid_schedule(two: Pool, prompts: int) -> None:
    """Each prompt is a micro-batch; for the tokens after it, neighbors are merged into as many as there are stages.

    The first stage sends what the reference's schedule says, in its order, and the tokens are those that it yields.
    """
    config, parallel = everything(4), ParallelConfig(pipeline=2)
    given = [list(range(index, 8)) for index in range(prompts)]
    schedule = hybrid(2, prompts, 2, 3)
    path = ParallelReference(RandomSource(config, 1), parallel, compute=FLOAT64)
    wanted = reference_generate(path.job, [torch.tensor(each) for each in given], schedule)
    results = two.run("generated", config=config, seed=1, parallel=parallel, prompts=given, tokens=3)
    assert [new for new, _ in results] == [wanted] * 2
    assert results[0][1] == [
        prompts // 2 if event.token else len(given[event.micro_batch]) for event in schedule.events if event.stage == 0
    ]


def overlapped(log: list[tuple[str, int]], size: int, hidden: int) -> list[list[int]]:
    """Of each sum over so many rows, the rows of the pieces that are computed between its begin and its wait."""
    found = []
    sums = [place for place, (what, bytes_) in enumerate(log) if bytes_ == 4 * size * hidden and "all_reduce" in what]
    for begin, end in zip(sums[::2], sums[1::2], strict=True):
        assert [log[begin][0], log[end][0]] == ["all_reduce begins", "all_reduce is awaited"]
        found.append([rows for what, rows in log[begin:end] if what == "computes"])
    return found


@pytest.mark.parametrize("residual", [Residual.SEQUENTIAL, Residual.PARALLEL])
def test_a_piece_is_computed_while_the_sums_of_another_are_on_their_way(two: Pool, residual: Residual) -> None:
    """Of a dense layer: every sum of one half of a prompt begins before the other half is computed, and is awaited
    after. Waiting at once, nothing is computed in between."""
    config = dense(residual)
    given = {"config": config, "seed": 1, "parallel": ParallelConfig(tensor=2)}
    halves = prompt_pieces(2 * PAIRED_PIECE + 1, given["parallel"])
    prompts: list[Tensor] = [torch.arange(sum(halves)) % config.vocabulary]
    later, earlier = sorted(halves)
    assert (earlier, later) == (257, 256)
    reductions = 2 if residual is Residual.SEQUENTIAL else 1
    for log in two.run("computing", prompts=prompts, **given):
        of_layers = overlapped(log, earlier, config.hidden)[-reductions * len(config.layers) :]
        assert len(of_layers) == reductions * len(config.layers)
        assert all(rows and set(rows) == {later} for rows in of_layers)
        assert all(set(rows) <= {earlier} for rows in overlapped(log, later, config.hidden))
        assert sum(map(bool, overlapped(log, later, config.hidden))) >= reductions * len(config.layers) - 1
    for log in two.run("computing", prompts=prompts, mutant="sums awaited at once", **given):
        assert not any(overlapped(log, earlier, config.hidden) + overlapped(log, later, config.hidden))


def dense(residual: Residual) -> ModelConfig:
    config = draw_model(400, layers=2)
    attention = replace(config.layers[0].attention, qk_norm=None)
    form = {"residual": residual, "norm_placement": NormPlacement.PRE_NORM}
    layer = replace(config.layers[0], attention=attention, **form)
    return replace(config, layers=(layer, layer), context=1024)
