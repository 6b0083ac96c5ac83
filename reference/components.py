"""The parts of the reference decoder as one value, so that any of them can be swapped.

>>> from dataclasses import replace
>>> def forgetful(query, key, value, *, visible_TS, scale):
...     return attention(query, key, value, visible_TS=visible_TS, scale=0.5 * scale)
>>> replace(DEFAULT, attention=forgetful).attention is forgetful
True
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..spec.config import LayerConfig, MlpConfig, NormConfig, RotaryLayout
from ..spec.moe import MoeConfig, RouterConfig
from ..spec.weights import LayerWeights, LinearWeights, MlpWeights, MoeWeights, NormWeights
from .attention import attention
from .cache import KVCache
from .layer import layer
from .linear import linear
from .mlp import mlp
from .moe import moe
from .norms import norm
from .positions import rotate
from .routing import Routing, route


class Norm(Protocol):
    def __call__(self, x: Tensor, weights: NormWeights, config: NormConfig, /) -> Tensor: ...


class Linear(Protocol):
    def __call__(self, x: Tensor, weights: LinearWeights, /) -> Tensor: ...


class Rotate(Protocol):
    def __call__(
        self, x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float, /
    ) -> Tensor: ...


class Attention(Protocol):
    """`bias_HTS`, `softcap` and `sink_H` are given by name, and only to models that have them."""

    def __call__(
        self,
        query_BTHD: Tensor,
        key_BSKD: Tensor,
        value_BSKD: Tensor,
        /,
        *,
        visible_TS: Tensor,
        scale: float,
        bias_HTS: Tensor | None = None,
        softcap: float | None = None,
        sink_H: Tensor | None = None,
    ) -> Tensor: ...


class Mlp(Protocol):
    def __call__(self, x_BTM: Tensor, weights: MlpWeights, config: MlpConfig, /, *, linear: Linear) -> Tensor: ...


class Route(Protocol):
    def __call__(self, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None, /) -> Routing: ...


class Moe(Protocol):
    def __call__(
        self, x_BTM: Tensor, weights: MoeWeights, config: MoeConfig, /, *, linear: Linear, mlp: Mlp, route: Route
    ) -> Tensor: ...


class Layer(Protocol):
    def __call__(
        self, x_BTM: Tensor, weights: LayerWeights, config: LayerConfig, cache: KVCache, components: "Components", /
    ) -> tuple[Tensor, KVCache]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    norm: Norm = norm
    linear: Linear = linear
    rotate: Rotate = rotate
    attention: Attention = attention
    mlp: Mlp = mlp
    moe: Moe = moe
    route: Route = route
    layer: Layer = layer


DEFAULT = Components()
