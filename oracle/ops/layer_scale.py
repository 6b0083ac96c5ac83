"""The sizes of what is rounded on the way through a layer: the reference's own layer, run on values that carry them.

The layer's order of parts is the reference's: its `Components` are swapped for functions that bound what they round,
and what stands between them (sums, factors, rearrangements) is bounded as torch is called. A right implementation may
round to the activations' dtype what the reference stores in it: each result of a part counts where the next reads it.

Shapes: B batch, T new tokens, M hidden, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...reference.cache import KVCache
from ...reference.components import Components
from ...reference.layer import layer, self_attention
from ...reference.moe import router_logits
from ...reference.routing import route as plain_route
from ...spec.config import MlpConfig, NormConfig, RotaryLayout
from ...spec.moe import MoeConfig
from ...spec.weights import LinearWeights, MlpWeights, MoeWeights, NormWeights
from ..budget import Sizes
from ..case import Inputs
from ..scale import Known, attention_known, clipped_known, exactly, linear_known, norm_known, shared, sum_known
from .mlp import mlp_known
from .moe_scale import moe_known
from .positions import rotate_known


class Sized(Tensor):
    """A value in float64 that carries the sizes of what was rounded on the way to it, through the reference.

    The last rounding of a result counts only where something reads it: what a layer returns rounds by its own size.
    """

    sizes: Known
    unread: Tensor
    """The value where it is a result; zero where it is an input, which was not rounded."""

    @staticmethod
    def of_input(value: Tensor) -> "Sized":
        """Return an input: nothing was rounded on the way to it."""
        return _sized(exactly(value), torch.zeros_like(value))

    @staticmethod
    def of_result(known: Known) -> "Sized":
        """Return the result of a part."""
        return _sized(known, known.value)

    @property
    def read(self) -> Known:
        """The value as the next part reads it: rounded once more."""
        return self.sizes.kept(self.unread)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if function in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **options)
        if function in _BOUNDED:
            return _BOUNDED[function](*args, **options)
        if function in _MOVING:
            return _moved(function, args, options)
        raise TypeError(f"nobody has said what {function} rounds; bound it in {__name__}")


def _sized(sizes: Known, unread: Tensor) -> Sized:
    carrier: Sized = sizes.value.as_subclass(Sized)
    carrier.sizes, carrier.unread = sizes, unread
    return carrier


def _as_sized(value: Tensor) -> Sized:
    return value if isinstance(value, Sized) else Sized.of_input(value)


def _moved(function: Callable[..., Tensor], args: tuple[Any, ...], options: Mapping[str, Any]) -> Sized:
    """The same rearrangement of the value and of each size; of several tensors where it joins them."""
    first, *rest = args
    several = isinstance(first, list | tuple)
    carriers = [_as_sized(each) for each in first] if several else [_as_sized(first)]

    def move(part: Callable[[Sized], Tensor]) -> Tensor:
        parts = [part(carrier) for carrier in carriers]
        return function(parts if several else parts[0], *rest, **options)

    sizes = Known(*(move(lambda c, name=name: getattr(c.sizes, name)) for name in ("value", "wide", "narrow")))  # type: ignore[misc]
    return _sized(sizes, move(lambda c: c.unread))


def _clamped(x: Sized, least: float, most: float) -> Sized:
    """The last rounding of what is clipped is that of the clip."""
    return _sized(clipped_known(x.sizes, least, most), x.unread.clamp(least, most))


def _times(x: Sized, factor: float) -> Sized:
    """A product with 1 rounds nothing."""
    if factor == 1:
        return x
    read = x.read
    return Sized.of_result(Known(factor * read.value, abs(factor) * read.wide, abs(factor) * read.narrow))


def _sum(one: Sized, other: Sized) -> Sized:
    return Sized.of_result(sum_known(_as_sized(one).read, _as_sized(other).read))


_FACTS = {getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim")}
_MOVING = {torch.cat, Tensor.reshape, Tensor.permute}
_BOUNDED: Mapping[Any, Callable[..., Sized]] = {
    Tensor.clamp: _clamped,
    Tensor.mul: _times,
    Tensor.add: _sum,
}


def _linear(x: Tensor, weights: LinearWeights) -> Sized:
    return Sized.of_result(linear_known(_as_sized(x).read, weights))


def _norm(x: Tensor, weights: NormWeights, config: NormConfig) -> Sized:
    return Sized.of_result(norm_known(_as_sized(x).read, weights, config))


def _rotate(
    x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float
) -> Sized:
    return Sized.of_result(rotate_known(_as_sized(x_BTHD).read, position_T, frequency_J, layout, attention_factor))


def _attention(query_BTHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, **options: Any) -> Sized:
    query, key, value = (_as_sized(x).read for x in (query_BTHD, key_BSKD, value_BSKD))
    return Sized.of_result(attention_known(query, key, value, **options))


def _mlp(x_BTM: Tensor, weights: MlpWeights, config: MlpConfig, *, linear: Any) -> Sized:
    return Sized.of_result(mlp_known(_as_sized(x_BTM).read, weights, config))


def _moe(x_BTM: Tensor, weights: MoeWeights, config: MoeConfig, *, linear: Any, mlp: Any, route: Any) -> Sized:
    """On the experts that the truth chooses, all of which serve: layers have no near-ties left out, nor a capacity."""
    shape = x_BTM.shape
    x_TM = _as_sized(x_BTM).read.mapped(lambda part: part.reshape(-1, shape[-1]))
    logit_TE = router_logits(x_TM.value, weights)
    chosen_TK = plain_route(logit_TE, config.router, weights.choice_bias_E).expert_TK
    out_TM = moe_known(x_TM, weights, config, chosen_TK, torch.ones_like(chosen_TK, dtype=torch.bool))
    return Sized.of_result(out_TM.mapped(lambda part: part.view(shape)))


_COMPONENTS = Components(norm=_norm, linear=_linear, rotate=_rotate, attention=_attention, mlp=_mlp, moe=_moe)


def _scale(reference: Callable[..., tuple[Tensor, KVCache]], exact: Inputs) -> list[Sizes]:
    cache: KVCache = exact["cache"]
    old = KVCache(Sized.of_input(cache.key_BSKD), Sized.of_input(cache.value_BSKD))
    x_BTM = Sized.of_input(exact["x_BTM"])
    out_BTM, grown = reference(x_BTM, exact["weights"], exact["config"], old, _COMPONENTS)
    sizes = [_as_sized(out).sizes for out in (out_BTM, grown.key_BSKD, grown.value_BSKD)]
    return [Sizes(each.wide, shared(each.narrow)) for each in sizes]


def scale_of_self_attention(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    return _scale(self_attention, exact)


def scale_of_layer(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
    return _scale(layer, exact)
