"""Ways to build correct and wrong implementations out of the reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Inputs
from .op import Function
from .trial import leaves, map_leaves


def changed(function: Function, change: Callable[[Inputs], Inputs]) -> Function:
    """The function, called on inputs in which `change` replaces some."""

    def call(**inputs: Any) -> Any:
        return function(**{**inputs, **change(inputs)})

    return call


def then(function: Function, change: Callable[[Tensor], Tensor]) -> Function:
    """The function, its first output changed."""

    def call(**inputs: Any) -> Any:
        out = function(**inputs)
        first = leaves(out)[0]
        done = False

        def replace_first(leaf: Any) -> Any:
            nonlocal done
            if isinstance(leaf, Tensor) and not done:
                done = True
                return change(first)
            return leaf

        return map_leaves(replace_first, out)

    return call


def one_row_3_percent_off(out: Tensor) -> Tensor:
    """The smallest row that is not zero, 3 % too large: beside a huge row no error of the whole tensor shows it."""
    if out.numel() == 0 or not out.is_floating_point():
        return out
    rows = out.reshape(-1, out.shape[-1]).clone()
    size = rows.abs().amax(-1).nan_to_num(torch.inf)
    smallest = int(size.where(size > 0, torch.inf).argmin())
    rows[smallest] *= 1.03
    return rows.reshape(out.shape)


def permutation(size: int) -> Tensor:
    """A fixed shuffle, the same for every call with this size."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))
