"""Batches that leave data groups without a sequence: nothing is sent for what is not there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twinfer.oracle.models import RandomSource
from twinfer.reference.parallel import job as jobs
from twinfer.reference.parallel.ledger import Collective
from twinfer.reference.parallel.path import ParallelReference
from twinfer.reference.path import ReferencePath
from twinfer.spec.parallel import ParallelConfig

from .test_path import AGREEMENT, disagreement, full_config

PARALLEL = ParallelConfig(data=3, pipeline=2, tensor=4)


def sent(batch: int) -> dict[Collective, int]:
    """Bytes that all ranks hand in for so many sequences of equal length, by the kind of collective."""
    path = ParallelReference(RandomSource(full_config()), PARALLEL)
    path.extend(path.open(batch, 3), [torch.tensor([1, 2, 3])] * batch)
    found = dict.fromkeys(Collective, 0)
    for call in path.job.ledger.calls:
        found[call.kind] += sum(call.bytes)
    return found


def wrong(batch: int) -> list[Collective]:
    """The kinds whose bytes are not so many times those of one sequence."""
    one, all_of_them = sent(1), sent(batch)
    return [kind for kind in Collective if all_of_them[kind] != batch * one[kind]]


@pytest.mark.parametrize("batch", range(1, 6))
def test_bytes_follow_the_sequences(batch: int) -> None:
    """Not the groups: of one to five sequences on three groups, all but three leave some without."""
    assert not wrong(batch)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_logits(batch: int) -> None:
    source = RandomSource(full_config())
    one, other = (
        ReferencePath(source, compute=torch.float64),
        ParallelReference(source, PARALLEL, compute=torch.float64),
    )
    assert disagreement(one, other, batch, batch) <= AGREEMENT


def _the_last_sequence_again(patch: pytest.MonkeyPatch) -> None:
    """Groups without a sequence compute the round's last one too."""

    def sequence_of(job: Any, rank: int, members: range) -> int:
        return members[min(job.parallel.place(rank).data, len(members) - 1)]

    patch.setattr(jobs.Job, "_sequence_of", sequence_of)


def _a_token_of_padding(patch: pytest.MonkeyPatch) -> None:
    """Groups without a sequence pass one token through."""
    enter = jobs.Job.enter

    def padded(job: Any, members: range, states: Any, tokens: Any) -> Any:
        x_RBTM = enter(job, members, states, tokens)
        return [x_BTM if x_BTM.shape[1] else x_BTM.new_zeros(1, 1, x_BTM.shape[2]) for x_BTM in x_RBTM]

    patch.setattr(jobs.Job, "enter", padded)


@pytest.mark.parametrize(
    "mutant", [_the_last_sequence_again, _a_token_of_padding], ids=lambda each: each.__name__.strip("_")
)
def test_mutants_are_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not wrong(2)
    mutant(monkeypatch)
    assert Collective.ALL_REDUCE in wrong(2)
