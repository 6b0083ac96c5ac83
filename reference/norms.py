"""Normalization of each token's hidden vector.

    layer norm:  out = gain * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) + bias     Ba et al. 2016
    RMS norm:    out = gain * x / sqrt(mean(x^2) + epsilon)                                    Zhang, Sennrich 2019

Some models store gain - 1 (`NormConfig.gain_from_one`), others leave out the bias of the layer norm.

Both reduce over the hidden axis alone, so tokens never mix and a tile of tokens can be normalized inside the matrix
product that follows it (paper, section III-D, regions 1 and 3 of Fig. 1c).

Shapes: M hidden.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ..spec.config import NormConfig, NormKind
from ..spec.weights import NormWeights


def norm(x: Tensor, weights: NormWeights, config: NormConfig) -> Tensor:
    """Normalize [..., M] as the config says."""
    if config.gain_from_one:
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = replace(weights, gain_M=1 + weights.gain_M.to(wide))
    match config.kind:
        case NormKind.LAYER:
            return layer_norm(x, weights, config.epsilon)
        case NormKind.RMS:
            return rms_norm(x, weights, config.epsilon)


def layer_norm(x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    """Center and scale [..., M] to mean 0 and variance 1, then apply gain and bias; returns x's dtype.

    The variance is the biased one (divided by M), and epsilon stands inside the root.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    variance = (centered * centered).mean(-1, keepdim=True)
    out = centered / torch.sqrt(variance + epsilon) * weights.gain_M.to(wide)
    if weights.bias_M is not None:
        out = out + weights.bias_M.to(wide)
    return out.to(x.dtype)


def rms_norm(x: Tensor, weights: NormWeights, epsilon: float) -> Tensor:
    """Scale [..., M] to mean square 1, then apply the gain; returns x's dtype.

    The gain is applied before rounding to x's dtype. (Some implementations round first, which matters below float32.)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mean_square = (x.to(wide) * x.to(wide)).mean(-1, keepdim=True)
    return (x.to(wide) / torch.sqrt(mean_square + epsilon) * weights.gain_M.to(wide)).to(x.dtype)
