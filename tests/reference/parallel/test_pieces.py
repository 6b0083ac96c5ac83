"""Prompts in pieces, each of them a micro-batch: what is computed, what is sent, and on which schedule."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.oracle.models import RandomSource
from twinfer.reference.parallel import job as jobs
from twinfer.reference.parallel import path as paths
from twinfer.reference.parallel.ledger import Collective
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.schedule import Schedule, baseline
from twinfer.reference.path import ReferencePath
from twinfer.spec import parallel as degrees
from twinfer.spec.config import ModelConfig
from twinfer.spec.parallel import LONGEST_PIECE, PAIRED_PIECE, STAGED_PIECE, ParallelConfig, prompt_pieces

from .test_path import AGREEMENT, disagreement, full_config
from .test_plan import assert_plan_is_ledger

PARALLEL = ParallelConfig(pipeline=3, tensor=2)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Cut prompts into pieces of at least two tokens."""
    for name in ("STAGED_PIECE", "PAIRED_PIECE"):
        monkeypatch.setattr(degrees, name, 2)
    return monkeypatch


def learned() -> ModelConfig:
    return replace(full_config(), learned_positions=True)


@given(
    tokens=st.integers(1, 5000), pipeline=st.integers(1, 5), tensor=st.integers(1, 4), expert=st.sampled_from([1, 2])
)
def test_even_pieces(tokens: int, pipeline: int, tensor: int, expert: int) -> None:
    """Pieces differ by one token at most; they are short only where stages or the two of a pair overlap."""
    parallel = ParallelConfig(data=expert, pipeline=pipeline, tensor=tensor, expert=expert)
    pieces = prompt_pieces(tokens, parallel)
    assert sum(pieces) == tokens
    assert max(pieces) - min(pieces) <= 1
    assert max(pieces) <= LONGEST_PIECE
    shortest = STAGED_PIECE if pipeline > 1 else PAIRED_PIECE if tensor > 1 and expert == 1 else LONGEST_PIECE
    assert len(pieces) == 1 or min(pieces) >= min(shortest, LONGEST_PIECE // 2)
    assert max(pieces) < 2 * shortest


@pytest.mark.parametrize("batch", [1, 4])
def test_logits(short: pytest.MonkeyPatch, batch: int) -> None:
    """Those of the unsharded reference, of prompts with 2, 1, 2 and 1 pieces on two data groups."""
    source, parallel = RandomSource(learned()), replace(PARALLEL, data=2)
    one = ReferencePath(source, compute=torch.float64)
    assert disagreement(one, ParallelReference(source, parallel, compute=torch.float64), 1, batch) <= AGREEMENT


@pytest.mark.parametrize("tokens", [2, 5, 9])
def test_plan(short: pytest.MonkeyPatch, tokens: int) -> None:
    """The plan counts the ledger's messages: pieces follow each other, and logits are gathered once."""
    assert_plan_is_ledger(learned(), PARALLEL, tokens)


def test_schedule(short: pytest.MonkeyPatch) -> None:
    """Of 9 tokens four pieces pass three stages in 6 slots; a send for each rank, border and piece, of so many rows."""
    done: list[Schedule] = []
    execute = paths.execute

    def noted(schedule: Schedule, *given: Any) -> Any:
        done.append(schedule)
        return execute(schedule, *given)

    short.setattr(paths, "execute", noted)
    config = learned()
    path = ParallelReference(RandomSource(config), PARALLEL, compute=torch.float64)
    path.extend(path.open(1, 9), [torch.arange(9)])
    assert done == [baseline(3, 4, 1)]
    assert done[0].slots == 6
    sent = [call.bytes[0] for call in path.job.ledger.calls if call.kind is Collective.SEND and call.ranks == (0, 2)]
    assert sent == [8 * config.hidden * rows for rows in (3, 2, 2, 2)]
    assert sum(call.kind is Collective.ALL_GATHER for call in path.job.ledger.calls) == 1


def _later_pieces_first(patch: pytest.MonkeyPatch) -> None:
    execute = paths.execute

    def backwards(schedule: Schedule, enter: Any, work: Any, leave: Any) -> Any:
        last = schedule.prompt_batches - 1
        results = execute(
            schedule,
            lambda micro_batch, *given: enter(last - micro_batch, *given),
            lambda stage, micro_batch, *given: work(stage, last - micro_batch, *given),
            lambda micro_batch, *given: leave(last - micro_batch, *given),
        )
        return {(last - micro_batch, token): result for (micro_batch, token), result in results.items()}

    patch.setattr(paths, "execute", backwards)


def _first_keys_not_kept(patch: pytest.MonkeyPatch) -> None:
    work = jobs.Job.work

    def wrong(job: Any, index: int, members: range, states: Any, x_RBTM: Any) -> Any:
        forgets = index == 2 and states[members.start].caches[2][0][0].length == 0
        return work(job, index, members, list(states) if forgets else states, x_RBTM)

    patch.setattr(jobs.Job, "work", wrong)


def _each_piece_from_the_start(patch: pytest.MonkeyPatch) -> None:
    embed = jobs.embed_over_ranks

    def wrong(token_RBT: Any, start_R: list[int], *given: Any) -> Any:
        return embed(token_RBT, [0] * len(start_R), *given)

    patch.setattr(jobs, "embed_over_ranks", wrong)


@pytest.mark.parametrize(
    "mutant",
    [_later_pieces_first, _first_keys_not_kept, _each_piece_from_the_start],
    ids=lambda each: each.__name__.strip("_"),
)
def test_mutants_are_caught(mutant: Callable[[pytest.MonkeyPatch], None], short: pytest.MonkeyPatch) -> None:
    """Of a prompt of four pieces."""
    source, prompt = RandomSource(learned()), torch.arange(9)
    whole = ReferencePath(source, compute=torch.float64)
    want_V = whole.extend(whole.open(1, 9), [prompt])[0]

    def off() -> float:
        path = ParallelReference(source, PARALLEL, compute=torch.float64)
        return float((path.extend(path.open(1, 9), [prompt])[0] - want_V).abs().max() / want_V.abs().max())

    assert off() <= AGREEMENT
    mutant(short)
    assert off() > AGREEMENT
