"""Whole models: one small fault in one layer is caught in every compute dtype, and right paths never alarm."""

from functools import cache, reduce
from operator import add

import pytest
import torch

from twinfer.compiled.path import CompiledPath
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.model_mutants import model_mutants
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.paths import PathComparison, check_leaning, compare_paths
from twinfer.oracle.schedule import Schedule, draw_schedule, generation
from twinfer.spec.config import Storage
from twinfer.spec.weights import WeightSource

COMPUTE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODELS = 12
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


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_no_fault_of_a_whole_model_is_missed(name: str, compute: torch.dtype) -> None:
    """Within 12 drawn models."""
    for seed in range(MODELS):
        source = model(seed)[0]
        mutant = dict(model_mutants(source, seed)).get(name)
        if mutant is not None and not compared(seed, compute, mutant).holds:
            return
    pytest.fail(f"{name}: passed {MODELS} models")


@pytest.mark.parametrize("compute", COMPUTE, ids=str)
def test_a_right_path_does_not_lean(compute: torch.dtype) -> None:
    """Not over one model, and not over the errors of four texts together."""
    for seed in range(3):
        right = compared(seed, compute, model(seed)[0])
        assert right.holds, right.failures
        assert right.leaning is not None
        assert float(right.leaning.ratio_P.max()) > 0


def test_an_offset_is_found_where_no_row_shows_it() -> None:
    """In bfloat16, over twelve schedules together: the layer, the number, and by how much it is off."""
    source = model(1)[0]
    wrong = dict(model_mutants(source, 0))["attention scale 3 % off"]
    exact = Baseline.of(source, compute=torch.bfloat16)
    path = CompiledPath(wrong, compute=torch.bfloat16, mode="eager")
    drawn = [draw_schedule(RandomPicker(seed), source.config) for seed in range(12)]
    seen = reduce(add, [compare_paths(exact, path, schedule) for schedule in drawn])
    assert seen.holds
    check_leaning(seen, torch.bfloat16)
    assert not seen.holds
    print(seen.failures)
