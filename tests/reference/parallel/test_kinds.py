"""Drawn cases of many ranks reach every convention, router recipe, kind of size and degree."""

from collections.abc import Iterable

from twinfer.spec.config import ModelConfig, Storage
from twinfer.spec.parallel import Exchange, ParallelConfig

from ...kinds import CONVENTIONS, RECIPES, SIZES, Kind, kinds_of
from ...parallel.drawn import draw_mixture, draw_model
from .drawn import draw_case, draw_mixture_case

DEGREES = {
    *(("degree", f"{name} {count}") for name in ("data", "pipeline", "tensor") for count in (2, 3)),
    ("degree", "several, that differ from one another"),
}
OF_EXPERTS = {
    *(("degree", f"expert {count}") for count in (2, 3, 4)),
    *(("degree", f"expert slices {count}") for count in (2, 3)),
    *(("exchange", each.value) for each in Exchange),
    ("exchange", "experts in replicas"),
}


def reached(cases: Iterable[tuple[ModelConfig, ParallelConfig]]) -> set[Kind]:
    return {kind for config, parallel in cases for kind in kinds_of(config, parallel, Storage.FLOAT32)}


def test_dense_models_of_the_reference() -> None:
    assert not (CONVENTIONS | SIZES | DEGREES) - reached(map(draw_case, range(200)))


def test_models_with_experts_of_the_reference() -> None:
    wanted = CONVENTIONS | SIZES | DEGREES | RECIPES | OF_EXPERTS
    assert not wanted - reached(map(draw_mixture_case, range(200)))


def test_models_of_real_ranks() -> None:
    """By the seeds of the exhaustive profile; how many ranks there are is no matter of chance there."""
    seeds, two = range(400, 440), ParallelConfig(tensor=2)
    dense = reached((draw_model(seed, layers=2), two) for seed in seeds)
    mixed = reached((draw_mixture(seed), two) for seed in seeds)
    sizes = SIZES - {("size", "layers that the stages do not divide")}
    assert not (CONVENTIONS | sizes) - dense
    assert not (CONVENTIONS | sizes | RECIPES) - mixed
