"""Rotary positions, from a table made once a step and shared by all layers of equal frequencies.

Shapes: T rows, H heads, D head size, J rotating pairs (2 * J <= D).
"""

import torch
from torch import Tensor

from ..spec.config import RotaryLayout
from .precision import accumulation_dtype


def rotary_table(
    position_T: Tensor, frequency_J: Tensor, attention_factor: float = 1.0, *, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return attention_factor * cos and sin of position * frequency, [T, J] each, in float32 or wider.

    Angles are computed in the frequencies' dtype, float64.

    In float32 the angle of position 8000 would be off by 2.4e-4 radians.
    """
    angle_TJ = position_T[:, None].to(frequency_J.dtype) * frequency_J[None, :]
    wide = accumulation_dtype(compute)
    return (attention_factor * angle_TJ.cos()).to(wide), (attention_factor * angle_TJ.sin()).to(wide)


def rotate(x_THD: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, layout: RotaryLayout) -> Tensor:
    """Each pair (a, b) of the first 2 J elements becomes (a cos - b sin, b cos + a sin); the others pass.

    Half-split pairs element j with j + J, interleaved 2 j with 2 j + 1. A quarter turn, both ways round:

        >>> x, cos, sin = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), torch.zeros(1, 2), torch.ones(1, 2)
        >>> rotate(x, cos, sin, RotaryLayout.HALF_SPLIT).tolist()
        [[[-3.0, -4.0, 1.0, 2.0, 5.0]]]
        >>> rotate(x, cos, sin, RotaryLayout.INTERLEAVED).tolist()
        [[[-2.0, 1.0, -4.0, 3.0, 5.0]]]
    """
    pairs = cos_TJ.shape[1]
    cos_T1J, sin_T1J = cos_TJ[:, None, :], sin_TJ[:, None, :]
    if layout is RotaryLayout.HALF_SPLIT:
        a_THJ, b_THJ = x_THD[..., :pairs], x_THD[..., pairs : 2 * pairs]
    else:
        a_THJ, b_THJ = x_THD[..., 0 : 2 * pairs : 2], x_THD[..., 1 : 2 * pairs : 2]
    turned_a_THJ = (a_THJ * cos_T1J - b_THJ * sin_T1J).to(x_THD.dtype)
    turned_b_THJ = (b_THJ * cos_T1J + a_THJ * sin_T1J).to(x_THD.dtype)
    if layout is RotaryLayout.HALF_SPLIT:
        turned = torch.cat((turned_a_THJ, turned_b_THJ), -1)
    else:
        turned = torch.stack((turned_a_THJ, turned_b_THJ), -1).flatten(-2)
    return torch.cat((turned, x_THD[..., 2 * pairs :]), -1) if 2 * pairs < x_THD.shape[-1] else turned
