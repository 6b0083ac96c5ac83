"""Forward error analysis: how large are the numbers whose rounding can reach a result?

Each function takes what an op takes, in float64, and with each activation x a tensor scale_x >= |x| such that x is
known to within about eps * scale_x; it returns the scale of the op's result, to first order. Higham 2002, chapter 3.
Exact inputs have scale |x|.

Shapes: as in the reference's files.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from ..reference.norms import norm
from ..spec.config import NormConfig, NormKind
from ..spec.weights import LinearWeights, NormWeights

_STEEPEST = 1.13
"""No activation function is steeper anywhere (GELU at x = 1.4; SILU reaches 1.10)."""


def linear_scale(scale_x: Tensor, weights: LinearWeights) -> Tensor:
    """The same contraction on absolute values."""
    out = einsum(scale_x, weights.weight_NI.abs(), "... i, n i -> ... n")
    return out if weights.bias_N is None else out + weights.bias_N.abs()


def norm_scale(x: Tensor, scale_x: Tensor, weights: NormWeights, config: NormConfig) -> Tensor:
    """Errors of x, and of the mean taken from it, divided by the deviation; and the relative error of the deviation."""
    if config.kind is NormKind.LAYER:
        scale_x = scale_x + scale_x.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)
    square = (x * x).mean(-1, keepdim=True) + config.epsilon
    of_deviation = (x.abs() * scale_x).mean(-1, keepdim=True) / square
    gain_M = 1 + weights.gain_M if config.gain_from_one else weights.gain_M
    out = gain_M.abs() * (scale_x + x.abs() * (1 + of_deviation)) / square.sqrt()
    return out if weights.bias_M is None else out + weights.bias_M.abs()


def activation_scale(scale_x: Tensor) -> Tensor:
    """Of any activation: |f(x)| <= |x|, and tails cancel (1 + erf, 1 + tanh)."""
    return _STEEPEST * scale_x


def attention_scale(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    *,
    visible_TS: Tensor,
    scale: float,
    bias_HTS: Tensor | None = None,
    softcap: float | None = None,
    scales: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The weighted absolute values, and how far they move as errors of the scores shift the weights.

    A cap bends scores without steepening them, so their errors stay as large at most.
    """
    scale_q, scale_k, scale_v = scales or (query_BTHD.abs(), key_BSKD.abs(), value_BSKD.abs())
    kv_heads = key_BSKD.shape[2]

    def score(q: Tensor, k: Tensor) -> Tensor:
        grouped = rearrange(q, "b t (k g) d -> b k g t d", k=kv_heads)
        return scale * einsum(grouped, k, "b k g t d, b s k d -> b k g t s")

    shaped = score(query_BTHD, key_BSKD)
    of_score = score(query_BTHD.abs(), scale_k) + score(scale_q, key_BSKD.abs())
    if softcap is not None:
        shaped = softcap * torch.tanh(shaped / softcap)
        of_score = of_score + shaped.abs()
    if bias_HTS is not None:
        bias_KGTS = rearrange(bias_HTS, "(k g) t s -> k g t s", k=kv_heads)
        shaped = shaped + bias_KGTS
        of_score = of_score + bias_KGTS.abs() + shaped.abs()  # the bias is rounded, and so is the sum
    weight_BKGTS = torch.softmax(shaped.masked_fill(~visible_TS, -torch.inf), -1).nan_to_num(0.0)
    of_score = of_score + (weight_BKGTS * of_score).sum(-1, keepdim=True)
    direct = einsum(weight_BKGTS, scale_v, "b k g t s, b s k d -> b t k g d")
    shifted = einsum(weight_BKGTS * of_score, value_BSKD.abs(), "b k g t s, b s k d -> b t k g d")
    return rearrange(direct + shifted, "b t k g d -> b t (k g) d")


def norm_with_scale(x: Tensor, scale_x: Tensor, weights: NormWeights, config: NormConfig) -> tuple[Tensor, Tensor]:
    return norm(x, weights, config), norm_scale(x, scale_x, weights, config)
