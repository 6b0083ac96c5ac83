"""The sizes of what is rounded on the way through a layer and through its attention, to first order.

The reference's own layer is run, so that no norm, residual or cache can stand elsewhere here than there. It is run on a
batch of twice as many sequences: first the values, then for each the scale to which it is known. A residual sum is then
the sum of values and of scales alike, and so is a cache that grows; each component is replaced by one that computes the
values as the reference does, and the scales by that component's own rule.

Shapes: B batch, T new tokens, S tokens before them, M hidden, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...reference import mlp as mlp_file
from ...reference.attention import attention
from ...reference.cache import KVCache
from ...reference.components import Components
from ...reference.layer import layer, self_attention
from ...reference.linear import linear
from ...reference.positions import rotate
from ...spec.config import MlpConfig, NormConfig
from ...spec.weights import LinearWeights, MlpWeights, NormWeights
from ..case import Inputs
from ..scale import attention_scale, linear_scale, norm_with_scale
from .mlp import mlp_scale
from .positions import rotate_scale


class Known(Tensor):
    """Values, and after them along the batch the scales to which they are known; in float64.

    >>> known = join(torch.tensor([[5.0, -1.0]]), torch.tensor([[6.0, 1.0]]))
    >>> (known + 0.5 * known).tolist()
    [[7.5, -1.5], [9.0, 1.5]]
    >>> known.clamp(-2.0, 2.0).tolist()  # a value is as well known after as before
    [[2.0, -1.0], [6.0, 1.0]]
    """

    def clamp(self, *bounds: Any) -> "Known":
        value, scale = split(self)
        return join(value.clamp(*bounds), scale)


def join(value: Tensor, scale: Tensor) -> Known:
    """Return both as one batch."""
    return torch.cat([value, scale]).as_subclass(Known)


def split(known: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and their scales."""
    value, scale = known.as_subclass(Tensor).chunk(2)
    return value, scale


def _norm(x: Tensor, weights: NormWeights, config: NormConfig, /) -> Tensor:
    return join(*norm_with_scale(*split(x), weights, config))


def _linear(x: Tensor, weights: LinearWeights, /) -> Tensor:
    value, scale = split(x)
    return join(linear(value, weights), linear_scale(scale, weights))


def _rotate(x_BTHD: Tensor, /, *turn: Any) -> Tensor:
    value, scale = split(x_BTHD)
    return join(rotate(value, *turn), rotate_scale(scale, *turn))


def _attention(query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, /, **options: Any) -> Tensor:
    given = [split(each) for each in (query_BTHD, key_BSKD, value_BSKD)]
    values, (scale_q, scale_k, scale_v) = [value for value, _ in given], [scale for _, scale in given]
    return join(attention(*values, **options), attention_scale(*values, **options, scales=(scale_q, scale_k, scale_v)))


def _mlp(x_BTM: Tensor, weights: MlpWeights, config: MlpConfig, /, *, linear: object) -> Tensor:
    value, scale = split(x_BTM)
    return join(mlp_file.mlp(value, weights, config), mlp_scale(scale, weights))


_SCALES = Components(norm=_norm, linear=_linear, rotate=_rotate, attention=_attention, mlp=_mlp)


def known_after(function: Callable[..., tuple[Tensor, KVCache]], exact: Inputs) -> list[tuple[Tensor, Tensor]]:
    """Return what the reference's layer or its attention gives, output, keys and values, each with its scales."""
    x_BTM: Tensor = exact["x_BTM"]
    old: KVCache = exact["cache"]
    cache = KVCache(join(old.key_BSKD, old.key_BSKD.abs()), join(old.value_BSKD, old.value_BSKD.abs()))
    out, grown = function(join(x_BTM, x_BTM.abs()), exact["weights"], exact["config"], cache, _SCALES)
    return [split(each) for each in (out, grown.key_BSKD, grown.value_BSKD)]


def scale_of_self_attention(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [scale for _, scale in known_after(self_attention, exact)]


def scale_of_layer(exact: Inputs, _: list[Tensor]) -> list[Tensor]:
    return [scale for _, scale in known_after(layer, exact)]
