"""What `twinfer routes` counts, against loops over the choices."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from twinfer.oracle.models import RandomSource
from twinfer.reference.routing import route
from twinfer.routing import gaps, routes
from twinfer.spec.config import (
    Activation,
    AttentionConfig,
    Head,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
)
from twinfer.spec.errors import NumericsError, RequestError
from twinfer.spec.moe import CapacityConfig, MoeConfig, RouterConfig, Score
from twinfer.spec.shard import Shard
from twinfer.spec.weights import LayerWeights, MoeWeights

NORM = NormConfig(kind=NormKind.RMS, epsilon=1e-5)
DENSE = MlpConfig(width=8, activation=Activation.SILU, gated=True)
LAYER = LayerConfig(norm=NORM, attention=AttentionConfig(heads=1, kv_heads=1, head_size=4, scale=0.5), mlp=DENSE)
ROUTER = RouterConfig(experts=4, top_k=2, score=Score.SOFTMAX_OF_CHOSEN)
SPARSE = replace(LAYER, mlp=MoeConfig(router=ROUTER, expert=DENSE))
CONFIG = ModelConfig(
    family="drawn",
    hidden=4,
    vocabulary=11,
    context=32,
    layers=(LAYER, SPARSE, LAYER, SPARSE),
    final_norm=NORM,
    learned_positions=False,
    head=Head.TIED,
)
PROMPTS = [[1, 2, 3, 4, 5, 6], [7, 8]]


def test_every_choice_is_counted_once_in_its_layer() -> None:
    found = routes(RandomSource(CONFIG), PROMPTS)
    assert [layer.layer for layer in found] == [1, 3]
    for layer in found:
        assert sum(layer.tokens) == 8 * 2
        assert layer.imbalance == max(layer.tokens) / 4
        assert layer.dropped is None
    alone = [routes(RandomSource(CONFIG), [prompt]) for prompt in PROMPTS]
    for place, layer in enumerate(found):
        summed = Counter[int]()
        for each in alone:
            summed.update(dict(enumerate(each[place].tokens)))
        assert layer.tokens == [summed[expert] for expert in range(4)]


def test_drops_are_what_exceeds_the_capacity() -> None:
    """Of one prompt, an expert keeps min(tokens, capacity); the rest of the choices is dropped."""
    for layer in routes(RandomSource(CONFIG), PROMPTS[:1], CapacityConfig(factor=0.7)):
        places = 3  # ceil(0.7 * 6 * 2 / 4)
        assert layer.dropped == sum(max(0, count - places) for count in layer.tokens) / 12


def test_the_closest_call_is_between_the_last_chosen_and_the_best_left() -> None:
    logit_TE = torch.tensor([[4.0, 1.0, 3.0, 2.75], [1.0, 1.0, 1.0, 0.0]])
    assert gaps(logit_TE, route(logit_TE, ROUTER), ROUTER, None).tolist() == [0.25, 0.0]


class RouterGoneWrong(RandomSource):
    """A drawn model in which the last layer's router has a row of NaN."""

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        weights = super().layer(index, shard)
        if index == 3:
            assert isinstance(weights.mlp, MoeWeights)
            weights.mlp.router.weight_NI[2] = torch.nan
        return weights


def test_a_logit_that_is_nan_is_named_by_its_layer_token_and_expert() -> None:
    with pytest.raises(NumericsError, match="layer 3: the router's logit of token 0 for expert 2 is NaN"):
        routes(RouterGoneWrong(CONFIG), PROMPTS)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(RequestError, match="has no experts"):
        routes(RandomSource(replace(CONFIG, layers=(LAYER,))), PROMPTS)
