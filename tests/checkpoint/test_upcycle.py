"""A dense model as a mixture of experts: equal experts whose weights sum to 1 are one expert."""

from dataclasses import replace

import pytest
import torch

from twinfer.checkpoint.upcycle import Upcycled
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.reference.path import ReferencePath
from twinfer.spec.errors import ConfigError
from twinfer.spec.moe import ROUTERS, Score, router
from twinfer.spec.weights import WeightSource

RENORMALIZING = [
    name for name, recipe in ROUTERS.items() if recipe.renormalize or recipe.score is Score.SOFTMAX_OF_CHOSEN
]
ROUNDING = 1e-12
"""Relative; float64 rounds by 1e-16, and a token's weights that sum to 0.999 would show at 1e-3."""


def logits(source: WeightSource) -> torch.Tensor:
    path = ReferencePath(source, compute=torch.float64)
    tokens = torch.arange(3) % source.config.vocabulary
    return path.extend(path.open(1, 3), [tokens], every_position=True)[0]


@pytest.mark.parametrize("recipe", RENORMALIZING)
def test_upcycled_is_dense(recipe: str) -> None:
    """For every recipe that renormalizes, the upcycled model's logits are the dense model's."""
    dense = _dense()
    expected = logits(dense)
    found = logits(Upcycled(dense, router(recipe, experts=4, top_k=2)))
    assert float((found - expected).abs().max() / expected.abs().max()) <= ROUNDING


@pytest.mark.parametrize("recipe", sorted(ROUTERS.keys() - set(RENORMALIZING)))
def test_weights_that_need_not_sum_to_one_are_refused(recipe: str) -> None:
    with pytest.raises(ConfigError, match="must sum to 1"):
        Upcycled(_dense(), router(recipe, experts=4, top_k=2))


def test_experts_are_not_upcycled_again() -> None:
    once = Upcycled(_dense(), router("mixtral", experts=2, top_k=2))
    with pytest.raises(ConfigError, match="layer 0 has 2 experts already"):
        Upcycled(once, router("mixtral", experts=2, top_k=2))


def _dense() -> RandomSource:
    config = next(
        drawn
        for seed in range(100)
        if (drawn := draw_model_config(RandomPicker(seed))).extensible and drawn.context > 4
    )
    return RandomSource(replace(config, family="drawn"), seed=3)
