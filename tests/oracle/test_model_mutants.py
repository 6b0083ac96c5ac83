"""Whole models: one small fault in one layer is caught in every compute dtype, and right paths never alarm."""

import random
from collections.abc import Sequence
from functools import cache, reduce
from operator import add

import pytest
import torch

from twinfer.compiled.path import CompiledPath
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.leaning import Leaning
from twinfer.oracle.model_mutants import model_mutants
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import PathComparison, compare_paths
from twinfer.oracle.schedule import Schedule, generation
from twinfer.spec.config import Storage
from twinfer.spec.weights import WeightSource

COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODELS = 12
SEEDS = {"attention scale 3 % off": (3,), "norm epsilon 1e-3": (8,), "query bias dropped": (8,)}
"""Models that show a fault which few do."""
NAMES = (
    "attention scale 3 % off",
    "window one wider",
    "norm epsilon 1e-3",
    "query bias dropped",
    "value bias dropped",
    "output bias dropped",
    "rotary table shifted by one",
    "two KV heads swapped",
    "two layers swapped",
    "final gain of one element ignored",
)


@cache
def model(seed: int) -> tuple[RandomSource, Schedule, Storage]:
    """A drawn model, and a schedule long enough to resolve: four texts of 20 to 30 tokens, and three decode steps."""
    pick = RandomPicker(seed)
    config = draw_model_config(pick)
    texts = tuple(tuple(pick.integer(0, config.vocabulary - 1) for _ in range(pick.integer(20, 30))) for _ in range(4))
    return RandomSource(config, seed), generation(texts, 4), pick.choice(list(Storage))


@cache
def baseline(seed: int, compute: torch.dtype) -> Baseline:
    source, _, storage = model(seed)
    return Baseline.of(source, storage=storage, compute=compute)


def compared(seed: int, compute: torch.dtype, given: WeightSource) -> PathComparison:
    _, schedule, storage = model(seed)
    path = CompiledPath(given, storage=storage, compute=compute, mode="eager")
    return compare_paths(baseline(seed, compute), path, schedule)


@pytest.mark.parametrize("name", NAMES)
def test_no_fault_of_a_whole_model_is_missed(name: str) -> None:
    """Within 12 drawn models, in bfloat16, which hides most."""
    assert_caught(name, torch.bfloat16, SEEDS.get(name, range(MODELS)))


@pytest.mark.parametrize("compute", [each for each in COMPUTE if each is not torch.bfloat16], ids=str)
def test_nor_is_one_in_another_compute_dtype(compute: torch.dtype) -> None:
    """Every fault, by models that show it in bfloat16 or by the first."""
    for name in NAMES:
        assert_caught(name, compute, SEEDS.get(name, range(MODELS)))


def assert_caught(name: str, compute: torch.dtype, seeds: Sequence[int]) -> None:
    for seed in seeds:
        source = model(seed)[0]
        mutant = dict(model_mutants(source, seed)).get(name)
        if mutant is not None and not compared(seed, compute, mutant).holds:
            return
    pytest.fail(f"{name}: passed {len(seeds)} models")


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16], ids=str)
def test_a_right_path_does_not_lean(compute: torch.dtype) -> None:
    """No number explains the errors of four texts, in either 16-bit dtype; yet they are projected."""
    right = compared(1, compute, model(1)[0])
    assert right.holds, right.failures
    assert right.leaning is not None
    assert 0 < float(right.leaning.ratio_P.max()) < 1


def test_an_offset_is_found_where_no_row_shows_it() -> None:
    """In bfloat16: every row is within its bound, and the message says which number of which layer is off."""
    source = model(3)[0]
    index = random.Random(3).randrange(len(source.config.layers))
    wrong = dict(model_mutants(source, 3))["attention scale 3 % off"]
    exact = Baseline.of(source, compute=torch.bfloat16)
    path = CompiledPath(wrong, compute=torch.bfloat16, mode="eager")
    texts = tuple(tuple((3 * t + s) % source.config.vocabulary for t in range(50)) for s in range(6))
    seen = compare_paths(exact, path, generation(texts, 4))
    assert seen.largest_ratio < 1
    (failure,) = seen.failures
    assert f"as if layer {index}'s attention scale were off by +" in failure


def test_leanings_of_many_schedules_add_up() -> None:
    """Errors too small to show in one schedule show in all of them together."""
    zero = torch.zeros(4, dtype=torch.float64)
    one = Leaning(zero + torch.tensor([0.0, 0.0, 0.02, 0.0]) * 3600, zero, zero + 3600, zero + 3600)
    assert one.fault(torch.bfloat16) is None
    together = reduce(add, [one] * 9)
    assert "layer 0's MLP output were off by +2.00%" in str(together.fault(torch.bfloat16))
    assert together.fault(torch.bfloat16) != one.fault(torch.bfloat16)


def test_an_offset_within_a_rounding_of_the_number_is_none() -> None:
    """Half of eps: 0.39 % in bfloat16."""
    square = torch.tensor([1e9, 1.0, 1.0, 1.0], dtype=torch.float64)
    for offset, wrong in ((0.0038, False), (0.0041, True)):
        seen = Leaning(square * torch.tensor([offset, 0, 0, 0]), 0 * square, square, square)
        assert (seen.fault(torch.bfloat16) is not None) == wrong


def test_what_the_eager_run_leans_too_is_no_fault() -> None:
    """Roundings of what recurs add up; a right path shares them with the plain eager run."""
    one = torch.ones(4, dtype=torch.float64)
    leaning = Leaning(9 * one, 4 * one, one, one)
    assert leaning.fault(torch.bfloat16) is None
    assert Leaning(11 * one, 4 * one, one, one).fault(torch.bfloat16) is not None
