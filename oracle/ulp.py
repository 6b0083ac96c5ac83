"""The unit in the last place: the unit in which every report gives errors."""

import math

import torch
from torch import Tensor


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The step from |value| to the next larger number of `dtype`, as float64, element by element.

    `value` may itself be of a wider dtype. Below the smallest normal number the step is the smallest subnormal one;
    at infinity and NaN, where there is no next number, it is NaN.

        >>> ulp(torch.tensor([1.0, 1.5, 2.0, 0.0]), torch.float32).log2().tolist()
        [-23.0, -23.0, -22.0, -149.0]
        >>> ulp(torch.tensor([256.0]), torch.bfloat16).tolist()
        [2.0]
    """
    limits = torch.finfo(dtype)
    digits = 1 - round(math.log2(limits.eps))  # binary digits of the significand, the hidden one included
    smallest = round(math.log2(limits.smallest_normal)) + 1  # exponent of the smallest normal number, as frexp counts
    magnitude = value.to(torch.float64).abs()
    exponent = torch.frexp(magnitude).exponent.clamp_min(smallest).where(magnitude > 0, smallest)
    step = torch.ldexp(torch.ones_like(magnitude), exponent - digits)
    return torch.where(torch.isfinite(magnitude), step, torch.nan)


def named_index(axes: str, index: tuple[int, ...]) -> str:
    """An index with its axes' names.

    >>> named_index("B T H", (0, 3, 1))
    'B=0 T=3 H=1'
    """
    return " ".join(f"{axis}={i}" for axis, i in zip(axes.split(), index, strict=True)) or "the only element"


def p99(values: Tensor) -> float:
    """Return the 99th percentile; torch's quantile takes no more than 16 million."""
    return float(values.kthvalue(max(1, round(0.99 * values.numel()))).values)
