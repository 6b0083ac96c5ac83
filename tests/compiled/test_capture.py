"""A CUDA graph can capture the decode step, as far as can be told without a GPU; and the checks can tell."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.compiled.sequences import StaticSequences
from twinfer.compiled.steps import decode_program, eager
from twinfer.compiled.weights import prepare
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.spec.config import Storage

from .capture_checks import value_read, violations

CPU = torch.device("cpu")


def decode_case(seed: int, storage: Storage, rows: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The decode program of a drawn model, and arguments for it."""
    config = draw_model_config(RandomPicker(seed))
    model = prepare(RandomSource(config, seed), storage, CPU)
    sequences = StaticSequences(config, rows, 9, CPU)
    step_3R = torch.stack([torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 3), 9 * torch.arange(rows)])
    return decode_program(config, storage, eager), (model, sequences.caches, step_3R, torch.arange(7))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_decode_step_reads_no_value(seed: int, storage: Storage, rows: int) -> None:
    program, arguments = decode_case(seed, storage, rows)
    assert value_read(program, arguments) is None


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("storage", list(Storage))
@torch.no_grad()
def test_the_decode_step_can_be_captured(storage: Storage, rows: int) -> None:
    """As `graph` captures it: every size fixed, fewer slots read than there are."""
    assert violations(*decode_case(0, storage, rows)) == []


def item(x: Tensor) -> Tensor:
    return x * x[0].item()


def branch(x: Tensor) -> Tensor:
    return x + 1 if bool(x[0] > 0) else x - 1


def chosen_size(x: Tensor) -> Tensor:
    return x[x > 0]


def positions(x: Tensor) -> Tensor:
    return x.nonzero()


def counts(x: Tensor) -> Tensor:
    return torch.bincount(x.long().abs())


def literal(x: Tensor) -> Tensor:
    return x + torch.tensor([2.0])


def homeless(x: Tensor) -> Tensor:
    return x + torch.arange(x.shape[0])


def moved(x: Tensor) -> Tensor:
    return x.to("cpu") + 1


def also_moved(x: Tensor) -> Tensor:
    return x.cpu() + 1


def harmless(x: Tensor) -> Tensor:
    return x.to(torch.float64) + torch.zeros(x.shape[0], device=x.device)


@pytest.mark.parametrize("fault", [item, branch, chosen_size, positions, counts])
def test_reads_of_values_are_caught_where_there_are_none(fault: Callable[[Tensor], Tensor]) -> None:
    assert value_read(fault, (torch.ones(3),)) is not None


@pytest.mark.parametrize("fault", [item, branch, chosen_size, positions, counts, literal, homeless, moved, also_moved])
@torch.no_grad()
def test_what_forbids_capture_is_found_in_the_graph(fault: Callable[[Tensor], Tensor]) -> None:
    assert violations(fault, (torch.ones(3),)) != []


@torch.no_grad()
def test_what_may_be_captured_is_let_through() -> None:
    assert value_read(harmless, (torch.ones(3),)) is None
    assert violations(harmless, (torch.ones(3),)) == []
