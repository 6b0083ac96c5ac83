"""A norm over the elements of all heads, whose heads lie on several ranks (OLMo 2).

    layer norm:  mean = sum over ranks of sum(x) / N,      variance = sum over ranks of sum((x - mean)^2) / N
    RMS norm:    mean square = sum over ranks of sum(x^2) / N

N counts the elements of all heads, each once. So RMS needs one all-reduce of one number a token, layer norm two. Where
ranks exceed key/value heads, several hold the same head: its elements come several times in the sum, all equally often,
and are counted as often in N, so that the mean is the same.

Shapes: R ranks (a list), B batch, T tokens, N elements of a rank's heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec.config import NormConfig, NormKind
from ...spec.weights import NormWeights
from .stage import Stage


def norm_over_ranks(
    x_RBTN: Sequence[Tensor], weights_R: Sequence[NormWeights], config: NormConfig, stage: Stage
) -> list[Tensor]:
    """Normalize over what the ranks of a tensor group hold together; returns each rank's part in x's dtype.

    One token whose elements 3 and 4 lie on two ranks: the mean square is (9 + 16) / 2, its root 3.536.

    >>> from twinfer.spec.parallel import ParallelConfig
    >>> from twinfer.reference.parallel.ledger import Ledger
    >>> x, ones = [torch.tensor([[[3.0]]]), torch.tensor([[[4.0]]])], [NormWeights(gain_M=torch.ones(1))] * 2
    >>> stage = Stage(0, ParallelConfig(tensor=2), Ledger())
    >>> norm_over_ranks(x, ones, NormConfig(kind=NormKind.RMS, epsilon=1e-9), stage)
    [tensor([[[0.8485]]]), tensor([[[1.1314]]])]
    """
    wide = torch.promote_types(x_RBTN[0].dtype, torch.float32)
    elements = x_RBTN[0].shape[-1] * stage.parallel.tensor
    value_RBTN = [x_BTN.to(wide) for x_BTN in x_RBTN]
    if config.kind is NormKind.LAYER:
        sum_RBT1 = stage.add_up([value_BTN.sum(-1, keepdim=True) for value_BTN in value_RBTN])
        value_RBTN = [value_BTN - sum_BT1 / elements for value_BTN, sum_BT1 in zip(value_RBTN, sum_RBT1, strict=True)]
    square_RBT1 = stage.add_up([(value_BTN * value_BTN).sum(-1, keepdim=True) for value_BTN in value_RBTN])
    out = []
    for x_BTN, value_BTN, square_BT1, weights in zip(x_RBTN, value_RBTN, square_RBT1, weights_R, strict=True):
        gain_N = weights.gain_M.to(wide) + (1 if config.gain_from_one else 0)
        normed_BTN = value_BTN / torch.sqrt(square_BT1 / elements + config.epsilon) * gain_N
        if weights.bias_M is not None:
            normed_BTN = normed_BTN + weights.bias_M.to(wide)
        out.append(normed_BTN.to(x_BTN.dtype))
    return out
