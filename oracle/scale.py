"""Forward error analysis: how large are the numbers whose rounding can reach a result?

A `Known` is a value beside the sizes of what was rounded on the way to it. Each function takes what an op takes, in
float64, and returns the op's result as such. Roundings are independent, so those of before are carried on as the root
of a sum of squares, each by the derivative with which it reaches the result (first order; Higham 2002, chapter 3;
Higham, Mary 2019 for the root); only what an op itself sums counts by absolute values. So sizes do not compound.

Shapes: as in the reference's files.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..reference.linear import linear
from ..reference.mlp import activation
from ..reference.norms import norm
from ..spec.config import Activation, NormConfig, NormKind
from ..spec.weights import LinearWeights, NormWeights

_ELEMENTS = 1000
"""Results of small cases have no more elements."""
_LEAST_DIGITS = torch.finfo(torch.bfloat16).eps
"""Of the dtypes that are stored."""
_STEEPEST = 1.13
"""No activation function is steeper anywhere (GELU at x = 1.4; SILU reaches 1.10)."""


@dataclass(frozen=True)
class Known:
    """A value in float64, and the sizes of what was rounded on the way to it, as they reach it."""

    value: Tensor
    wide: Tensor
    """To float32."""
    narrow: Tensor
    """To the 16-bit dtype of activations, the value itself not included."""

    @property
    def stored(self) -> "Known":
        """The same value, rounded once more as an activation is when it is returned or kept."""
        return self.kept(self.value)

    def kept(self, rounded: Tensor) -> "Known":
        """The same value, rounded once more by a number of this size."""
        return Known(self.value, self.wide, root(self.narrow, rounded))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Known":
        """Value and sizes, each rearranged by the same function."""
        return Known(function(self.value), function(self.wide), function(self.narrow))


def exactly(value: Tensor) -> Known:
    """An input: nothing was rounded on the way to it."""
    return Known(value, torch.zeros_like(value), torch.zeros_like(value))


def root(*sizes: Tensor) -> Tensor:
    """The root of the sum of squares, element by element."""
    total = sizes[0] * sizes[0]
    for size in sizes[1:]:
        total = total + size * size
    return total.sqrt()


def shared(narrow: Tensor) -> Tensor:
    """The part of these sizes that a candidate is allowed, where the reference stores the same parts.

    With twice the reference's own error, half is enough for a thousand elements. The largest of n independent normal
    deviations grows as the root of log n: for a million elements the part is 0.71.
    """
    luck = math.sqrt(math.log(max(narrow.numel(), _ELEMENTS)) / math.log(_ELEMENTS))
    return narrow / 2 * luck


def carried(size: Tensor, weight_NI: Tensor) -> Tensor:
    """Independent errors of these sizes, through a product."""
    return F.linear(size * size, weight_NI * weight_NI).sqrt()


def linear_scale(size_x: Tensor, weights: LinearWeights) -> Tensor:
    """The same contraction on absolute values."""
    return F.linear(size_x, weights.weight_NI.abs(), None if weights.bias_N is None else weights.bias_N.abs())


def linear_known(x: Known, weights: LinearWeights) -> Known:
    """The product, with a bias added to it; where there is one, the product alone may be stored before."""
    value = linear(x.value, weights)
    wide = root(linear_scale(x.value.abs(), weights), carried(x.wide, weights.weight_NI))
    narrow = carried(x.narrow, weights.weight_NI)
    return Known(value, wide, narrow if weights.bias_N is None else root(narrow, value - weights.bias_N))


def norm_reach(x: Tensor) -> Tensor:
    """The sum of squares of each row, which some divide by their number only at the end."""
    return (x * x).sum(-1, keepdim=True)


def norm_scale(x: Tensor, weights: NormWeights, config: NormConfig) -> Tensor:
    """Errors of x, and of the mean taken from it, divided by the deviation; and the relative error of the deviation."""
    size = x.abs()
    if config.kind is NormKind.LAYER:
        size = size + size.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)
    square = (x * x).mean(-1, keepdim=True) + config.epsilon
    of_deviation = (x.abs() * size).mean(-1, keepdim=True) / square
    out = _gain(weights, config).abs() * (size + x.abs() * (1 + of_deviation)) / square.sqrt()
    return out if weights.bias_M is None else out + weights.bias_M.abs()


def norm_known(x: Known, weights: NormWeights, config: NormConfig) -> Known:
    centered = x.value - x.value.mean(-1, keepdim=True) if config.kind is NormKind.LAYER else x.value
    deviation = ((centered * centered).mean(-1, keepdim=True) + config.epsilon).sqrt()
    unit, count = centered / deviation, x.value.shape[-1]

    def through(size: Tensor) -> Tensor:
        of_mean = (size * size).sum(-1, keepdim=True).sqrt() / count
        of_deviation = unit * ((unit * size) ** 2).sum(-1, keepdim=True).sqrt() / count
        return _gain(weights, config).abs() / deviation * root(size, of_mean, of_deviation)

    wide = root(norm_scale(x.value, weights, config), through(x.wide))
    return Known(norm(x.value, weights, config), wide, through(x.narrow))


def _gain(weights: NormWeights, config: NormConfig) -> Tensor:
    return 1 + weights.gain_M if config.gain_from_one else weights.gain_M


def activation_scale(size_x: Tensor) -> Tensor:
    """Of any activation: |f(x)| <= |x|, and tails cancel (1 + erf, 1 + tanh)."""
    return _STEEPEST * size_x


def activation_known(x: Known, kind: Activation) -> Known:
    wide = root(activation_scale(x.value.abs()), activation_scale(x.wide))
    return Known(activation(x.value, kind), wide, activation_scale(x.narrow))


def clipped_known(x: Known, least: float, most: float) -> Known:
    """Clipping rounds nothing; what was rounded before it reaches no further than before, and not past the clip.

    A value counts as clipped where no rounding brings it back: beyond the clip by four roundings of either size.
    """
    room = 4 * (_LEAST_DIGITS * x.narrow + torch.finfo(torch.float32).eps * x.wide)
    inside = (x.value <= most + room) & (x.value >= least - room)
    return Known(x.value.clamp(least, most), x.wide * inside, x.narrow * inside)


def product_known(a: Known, b: Known) -> Known:
    """The product of two results. Where both are sums that cancel to nothing, what is left is their errors' product."""

    def through(size_a: Tensor, size_b: Tensor, unit: float) -> Tensor:
        return root(size_a * b.value, a.value * size_b, 4 * unit * size_a * size_b)

    value = a.value * b.value
    wide = root(value, through(a.wide, b.wide, torch.finfo(torch.float32).eps))
    return Known(value, wide, through(a.narrow, b.narrow, torch.finfo(torch.bfloat16).eps / 2))


def sum_known(a: Known, b: Known) -> Known:
    return Known(a.value + b.value, root(a.value, b.value, a.wide, b.wide), root(a.narrow, b.narrow))


def attention_known(
    query_BTHD: Known,
    key_BSKD: Known,
    value_BSKD: Known,
    *,
    visible_TS: Tensor,
    scale: float,
    bias_HTS: Tensor | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Known:
    """The weighted values; how far they move as errors of the scores shift the weights; and the weights, rounded.

    A cap bends scores without steepening them, so their errors stay as large at most. Errors of scores share the query,
    so their effects are added; kernels that multiply 16-bit weights round these, independently unless scores tie.
    """
    q, k, v = query_BTHD, key_BSKD, value_BSKD
    kv_heads = k.value.shape[2]
    seen_BTS = visible_TS.expand(len(q.value), -1, -1)
    looked_at_BS11 = seen_BTS.any(1)[:, :, None, None]
    if not looked_at_BS11.all():
        k, v = (known.mapped(lambda x: x.where(looked_at_BS11, 0.0)) for known in (k, v))
    q = q.mapped(lambda x: rearrange(x, "b t (k g) d -> b k g t d", k=kv_heads))
    k, v = (known.mapped(lambda x: x.transpose(1, 2)[:, :, None]) for known in (k, v))

    def of_errors(size_q: Tensor, size_k: Tensor) -> Tensor:
        squares = size_q**2 @ (k.value**2).mT + q.value**2 @ (size_k**2).mT
        return abs(scale) * squares.sqrt()

    shaped = scale * (q.value @ k.value.mT)
    of_score = abs(scale) * (q.value.abs() @ k.value.abs().mT) + of_errors(q.wide, k.wide)
    if softcap is not None:
        shaped = softcap * torch.tanh(shaped / softcap)
        of_score = of_score + shaped.abs()
    if bias_HTS is not None:
        bias_KGTS = rearrange(bias_HTS, "(k g) t s -> k g t s", k=kv_heads)
        shaped = shaped + bias_KGTS
        of_score = of_score + bias_KGTS.abs() + shaped.abs()  # the bias is rounded, and so is the sum
    shaped, keys = shaped.masked_fill(~seen_BTS[:, None, None], -torch.inf), k.value.shape[-2]
    if sink_H is not None:
        sink_KGT1 = rearrange(sink_H, "(k g) -> k g 1 1", k=kv_heads).expand(*shaped.shape[:-1], 1)
        shaped = torch.cat([shaped, sink_KGT1], -1)
    weight = torch.softmax(shaped, -1).nan_to_num(0.0)[..., :keys]
    size_v = v.value.abs()

    def shifted(of_score: Tensor) -> Tensor:
        return weight * (of_score + (weight * of_score).sum(-1, keepdim=True)) @ size_v

    rounded = torch.maximum(weight, (weight * 2**11).clamp_max(2.0**-14))  # float16 has no finer steps below 2**-14
    rounded = torch.minimum(rounded, (1 - weight) * 2**11)  # one is a number of every dtype: near it less is lost
    of_weights = torch.minimum(rounded @ size_v / 2, 2 * (rounded**2 @ size_v**2).sqrt())
    wide = weight @ size_v + shifted(of_score) + (weight**2 @ v.wide**2).sqrt()
    narrow = root(of_weights, shifted(of_errors(q.narrow, k.narrow)), (weight**2 @ v.narrow**2).sqrt())
    out = Known(weight @ v.value, wide, narrow)
    return out.mapped(lambda x: rearrange(x, "b k g t d -> b t (k g) d"))
