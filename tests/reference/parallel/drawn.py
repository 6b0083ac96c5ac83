"""Models with integer weights, components without roundings, and degrees that differ from one another."""

from dataclasses import replace
from itertools import product
from typing import Any

from torch import Tensor

from twinfer.oracle.case import Picker, RandomPicker
from twinfer.oracle.models import RandomSource, draw_moe
from twinfer.reference.components import DEFAULT, Components
from twinfer.spec.config import Activation, LayerConfig, ModelConfig, NormPlacement, Residual
from twinfer.spec.errors import RequestError
from twinfer.spec.mlp import MlpConfig
from twinfer.spec.parallel import Exchange, ParallelConfig, check_parallel
from twinfer.spec.shapes import is_buffer
from twinfer.spec.shard import degrees

from ...shards import shareable


class IntegerSource(RandomSource):
    """Weights from -2 to 2: in float64 no sum of a small model rounds."""

    def _tensor(self, part: str, name: str, shape: tuple[int, ...]) -> Tensor:
        if is_buffer(name):
            return super()._tensor(part, name, shape)
        return (2 * self._normal(part, name, shape)).round().clamp(-2, 2)


def _same(x: Tensor, *_: Any) -> Tensor:
    return x


def _sum_of_heads(query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, /, **_: Any) -> Tensor:
    """Linear, and each query head with its own key/value head: query + sum of keys - last value."""
    group = query_BTHD.shape[2] // key_BSKD.shape[2]
    key_B1KD = key_BSKD.sum(1, keepdim=True) - value_BSKD[:, -1:]
    return query_BTHD + key_B1KD.repeat_interleave(group, 2)


EXACT: Components = replace(DEFAULT, norm=_same, rotate=_same, attention=_sum_of_heads)


def exact_layer(layer: LayerConfig, placement: NormPlacement, residual: Residual) -> LayerConfig:
    """The layer without what rounds: roots, exponentials, angles."""
    attention = replace(layer.attention, qk_norm=None, alibi=False, softcap=None, rotary=None)
    mlp = replace(layer.mlp, activation=Activation.RELU)
    return replace(layer, attention=attention, mlp=mlp, norm_placement=placement, residual=residual)


def draw_parallel(pick: Picker, config: ModelConfig) -> ParallelConfig:
    """Any degrees of a dense model that it can be divided by."""
    return ParallelConfig(
        data=pick.integer(1, 3),
        pipeline=pick.integer(1, len(config.layers)),
        tensor=pick.choice([each for each in degrees(config) if each > 1][:4]),
    )


def draw_layers(pick: Picker, layers: int) -> ModelConfig:
    """A drawn config of that many layers, no two of which need be alike."""
    config = shareable(pick)
    return replace(config, layers=tuple(pick.choice(config.layers) for _ in range(layers)))


def draw_case(seed: int) -> tuple[ModelConfig, ParallelConfig]:
    """A dense model and degrees that it can be divided by."""
    pick = RandomPicker(seed)
    config = draw_layers(pick, pick.integer(1, 4))
    return config, draw_parallel(pick, config)


def draw_mixture_case(seed: int) -> tuple[ModelConfig, ParallelConfig]:
    """A model with experts and degrees that it can be divided by."""
    pick = RandomPicker(seed)
    config = draw_mixture(pick, pick.integer(1, 3))
    return config, draw_parallel_mixture(pick, config)


def draw_mixture(pick: Picker, layers: int) -> ModelConfig:
    """A drawn config of that many layers, of which one at least has experts, each by a recipe of its own."""
    config, first = draw_layers(pick, layers), pick.integer(0, layers - 1)
    return replace(
        config,
        layers=tuple(
            replace(layer, mlp=draw_moe(pick, layer.mlp))
            if isinstance(layer.mlp, MlpConfig) and (index == first or pick.integer(0, 1))
            else layer
            for index, layer in enumerate(config.layers)
        ),
    )


def draw_parallel_mixture(pick: Picker, config: ModelConfig) -> ParallelConfig:
    """Any degrees of a model with experts that it can be divided by, its experts by more than one."""
    pipeline, tensor = pick.integer(1, len(config.layers)), pick.choice(degrees(config)[:4])
    data = pick.integer(1 if tensor > 1 else 2, 4)
    dense = ParallelConfig(data=data, pipeline=pipeline, tensor=tensor)
    shared = [each for each in product(range(1, 17), repeat=2) if _shares_experts(config, dense, *each)]
    if not shared:
        return draw_parallel_mixture(pick, config)
    expert, slices = pick.choice(shared)
    exchange = pick.choice([*Exchange] if expert % tensor == 0 else [Exchange.DIRECT])
    return replace(dense, expert=expert, expert_slices=slices, exchange=exchange)


def _shares_experts(config: ModelConfig, dense: ParallelConfig, expert: int, slices: int) -> bool:
    """Report whether experts can be shared so, by more than one rank."""
    try:
        check_parallel(config, replace(dense, expert=expert, expert_slices=slices))
    except RequestError:
        return False
    return expert * slices > 1
