"""Positions that act inside attention: rotary embedding, and ALiBi.

Rotary position embedding: each pair of a head's elements turns by an angle proportional to the token's position.

    [x1', x2'] = [x1 cos a - x2 sin a,  x1 sin a + x2 cos a],     a = position * frequency[j]  for pair j

Query and key turned so, their product depends on the distance between them alone. Su et al. 2021, eq. 34. Which two
elements make a pair is `RotaryLayout`; frequencies, with whatever scaling a model applies to them, come as weights.
Models stretched to longer contexts may multiply what turns by a magnitude.

ALiBi instead lowers a score by slope[h] for every token between the query and the key (Press et al. 2022, section 3).
(Learned positions are a table: see `embedding`.)

Shapes: B batch, T tokens, S key tokens, H heads, D head size, J pairs, so that 2J elements turn and D - 2J pass
unchanged.
"""

import torch
from einops import rearrange
from torch import Tensor

from ..spec.config import RotaryLayout


def rotate(
    x_BTHD: Tensor, position_T: Tensor, frequency_J: Tensor, layout: RotaryLayout, attention_factor: float = 1.0
) -> Tensor:
    """Turn the first 2J elements of every head by its token's position; returns x's shape and dtype.

    Angles are float64 whatever x is: at position 100 000, rounding the product alone to float32 moves an angle by up to
    0.004 radians.

        >>> quarter = torch.tensor([torch.pi / 2], dtype=torch.float64)
        >>> rotate(torch.tensor([[[[1.0, 0.0, 7.0]]]]), torch.tensor([1]), quarter, RotaryLayout.HALF_SPLIT).round()
        tensor([[[[0., 1., 7.]]]])
    """
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    angle_TJ = position_T[:, None].to(torch.float64) * frequency_J.to(torch.float64)
    cos_T1J = (attention_factor * angle_TJ.cos()).to(wide)[:, None, :]
    sin_T1J = (attention_factor * angle_TJ.sin()).to(wide)[:, None, :]

    turning, passing = x_BTHD[..., : 2 * len(frequency_J)], x_BTHD[..., 2 * len(frequency_J) :]
    pairs = {RotaryLayout.HALF_SPLIT: "(pair j)", RotaryLayout.INTERLEAVED: "(j pair)"}[layout]
    first, second = rearrange(turning.to(wide), f"b t h {pairs} -> pair b t h j", pair=2)
    turned = torch.stack([first * cos_T1J - second * sin_T1J, first * sin_T1J + second * cos_T1J])
    return torch.cat([rearrange(turned, f"pair b t h j -> b t h {pairs}").to(x_BTHD.dtype), passing], dim=-1)


def alibi(slope_H: Tensor, query_position_T: Tensor, key_position_S: Tensor) -> Tensor:
    """What ALiBi adds to each score: slope * (key position - query position), [H, T, S] in the slopes' dtype.

    >>> alibi(torch.tensor([0.5]), torch.tensor([2]), torch.arange(3)).tolist()
    [[[-1.0, -0.5, 0.0]]]
    """
    distance_TS = key_position_S[None, :] - query_position_T[:, None]
    return (slope_H.to(torch.float64)[:, None, None] * distance_TS).to(slope_H.dtype)
