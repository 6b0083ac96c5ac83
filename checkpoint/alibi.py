"""ALiBi's slopes, made once, in float64: by how much each head's scores fall with every token of distance.

    slope[h] = 2 ** (-most * (h + 1) / H)      H heads, a power of two; most is 8 (Press et al. 2022, section 3)

Of another number of heads, the first are those of the next smaller power of two, and the others every other one of
the next larger.
"""

import torch
from torch import Tensor


def slopes(heads: int, most: float = 8.0) -> Tensor:
    """The slopes of all heads, float64 [H].

    >>> slopes(2).tolist(), slopes(3).tolist()
    ([0.0625, 0.00390625], [0.0625, 0.00390625, 0.25])
    """
    power = 2 ** (heads.bit_length() - 1)
    return torch.cat([_geometric(power, most), _geometric(2 * power, most)[0::2][: heads - power]])


def _geometric(heads: int, most: float) -> Tensor:
    return 2.0 ** (-most * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads)
