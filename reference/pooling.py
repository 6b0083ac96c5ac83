"""One vector for a whole text, out of the hidden vectors of its tokens; texts are then compared by their directions.

    mean:         out = (1 / T) sum_t x[t]
    cls:          out = x[0]
    unit length:  out = x / |x|,  so that <out(a), out(b)> is the cosine of the angle between a and b

Reimers, Gurevych 2019 (Sentence-BERT), section 3. Special tokens count as others do: a text of n tokens between [CLS]
and [SEP] has T = n + 2, and x[0] is that of [CLS]. There is one text at a time, so there is no padding to leave out.

Shapes: T tokens, M hidden.
"""

import torch
from torch import Tensor

from ..spec.config import Pooling


def pool(hidden_TM: Tensor, pooling: Pooling) -> Tensor:
    """The vector [M] of a text of at least one token, in the hidden vectors' dtype.

    >>> pool(torch.tensor([[1.0, 8.0], [3.0, 0.0]]), Pooling.MEAN)
    tensor([2., 4.])
    """
    match pooling:
        case Pooling.MEAN:
            wide = torch.promote_types(hidden_TM.dtype, torch.float32)
            return hidden_TM.to(wide).mean(0).to(hidden_TM.dtype)
        case Pooling.CLS:
            return hidden_TM[0]


def unit_length(x: Tensor) -> Tensor:
    """Scale vectors [..., M] to length 1; returns x's dtype. A vector of zeros has no direction, and stays as it is.

    The largest element is divided out first: squares of very large or small ones would leave the range of floats.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    tiny = torch.finfo(wide).tiny
    scaled = x.to(wide) / x.to(wide).abs().amax(-1, keepdim=True).clamp_min(tiny)
    length = torch.sqrt((scaled * scaled).sum(-1, keepdim=True))
    return (scaled / length.clamp_min(tiny)).to(x.dtype)
