"""What mixes up micro-batches on a pipeline is seen in the tokens that are generated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twinfer.oracle.models import RandomSource
from twinfer.reference.parallel import generation
from twinfer.reference.parallel import job as jobs
from twinfer.reference.parallel.generation import generate
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.parallel.schedule import hybrid
from twinfer.reference.path import ReferencePath
from twinfer.spec.parallel import ParallelConfig

from .test_path import full_config, greedy

PARALLEL = ParallelConfig(data=2, pipeline=3, tensor=4)
ROUNDS = 4


def _keys_of_another_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """After the prompt, the last stage takes the keys and values of the round after."""
    work = jobs.Job.work

    def wrong(job: Any, index: int, members: range, states: Any, x_RBTM: Any) -> Any:
        if index == 2 and states[members.start].caches[2][0][0].length:
            first = (members.start + PARALLEL.data) % (ROUNDS * PARALLEL.data)
            members = range(first, first + PARALLEL.data)
        return work(job, index, members, states, x_RBTM)

    patch.setattr(jobs.Job, "work", wrong)


def _first_of_those_merged_only(patch: pytest.MonkeyPatch) -> None:
    """After the prompt a micro-batch is taken for its own number again, as if neighbors had not been merged."""
    execute = generation.execute

    def wrong(schedule: Any, enter: Any, work: Any, leave: Any) -> Any:
        def swapped(micro_batch: int, token: int, results: Any) -> Any:
            return enter(1 - micro_batch if token == 1 else micro_batch, token, results)

        return execute(schedule, swapped, work, leave)

    patch.setattr(generation, "execute", wrong)


def _tokens_of_the_other_data_group(patch: pytest.MonkeyPatch) -> None:
    leave = jobs.Job.leave
    patch.setattr(jobs.Job, "leave", lambda job, x_RBTM: leave(job, x_RBTM)[::-1])


def _keys_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A stage computes and keeps nothing."""
    work = jobs.Job.work

    def wrong(job: Any, index: int, members: range, states: Any, x_RBTM: Any) -> Any:
        return work(job, index, members, list(states) if index == 1 else states, x_RBTM)

    patch.setattr(jobs.Job, "work", wrong)


Mutant = Callable[[pytest.MonkeyPatch], None]
MUTANTS: list[Mutant] = [
    _keys_of_another_micro_batch,
    _first_of_those_merged_only,
    _tokens_of_the_other_data_group,
    _keys_are_forgotten,
]


@pytest.mark.parametrize("mutant", [None, *MUTANTS], ids=lambda each: each.__name__.strip("_") if each else "none")
def test_mutants_are_caught(mutant: Mutant | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a hybrid schedule of 4 micro-batches, then 2, of two rounds each; prompts are equally long."""
    source, generator = RandomSource(full_config(), 1), torch.Generator().manual_seed(1)
    prompts = [torch.randint(37, (3,), generator=generator) for _ in range(ROUNDS * PARALLEL.data)]
    wanted = greedy(ReferencePath(source, compute=torch.float64), prompts, 4)
    path = ParallelReference(source, PARALLEL, compute=torch.float64)
    if mutant is not None:
        mutant(monkeypatch)
    assert (generate(path.job, prompts, hybrid(3, 4, 2, 4)) != wanted) == (mutant is not None)
