"""Scales of whole rows where ranks hold some columns of each: quantize, then slice.

int8 has one scale a row, the row's absmax / 127. A rank that took the absmax of its own columns would store other
numbers than one rank does. Row [127, 2 | 1, 4], cut between two ranks, has scale 1 and is stored as it is; by its own
absmax of 4 the second rank would store 1 as 32 * 4 / 127 = 1.008. So ranks that hold columns of the same rows find the
absmax of each row together: each finds that of its own columns, and the largest of all, an all-reduce, is exact.

    own = column_absmax(weights)                                       rank by rank
    whole = {name: all_reduce(each, MAX) for name, each in own}        in the tensor group; of experts, the slice group
    weights = with_absmax(weights, whole)

Matrices cut by rows have whole rows, and int4 is cut between its groups: both are stored as on one rank without this.

Shapes: E experts, N rows.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .shapes import is_matrix
from .shard import is_cut_by_columns
from .weights import LayerWeights, LinearWeights, StackedLinearWeights, tensors


def column_absmax(weights: LayerWeights) -> dict[str, Tensor]:
    """Return the absmax of each row of what is cut by columns, float32 [N] or [E, N], by the names of the linear maps.

    >>> linear = LinearWeights(weight_NI=torch.tensor([[1.0, -4.0], [0.0, 0.0]]))
    >>> _absmax(linear.weight_NI)
    tensor([4., 0.])
    """
    return {
        name.rpartition(".")[0]: _absmax(tensor)
        for name, tensor in tensors(weights)
        if is_matrix(name) and is_cut_by_columns(name)
    }


def with_absmax(weights: LayerWeights, absmax: Mapping[str, Tensor]) -> LayerWeights:
    """Return weights whose quantizers take these absmaxes for those of whole rows, by the names of the linear maps."""
    result: LayerWeights = _given(weights, absmax, "")
    return result


def _given(part: Any, absmax: Mapping[str, Tensor], name: str) -> Any:
    if isinstance(part, LinearWeights):
        return replace(part, absmax_N=absmax[name]) if name in absmax else part
    if isinstance(part, StackedLinearWeights):
        return replace(part, absmax_EN=absmax[name]) if name in absmax else part
    inner = {field.name: getattr(part, field.name) for field in fields(part)}
    inside = {
        each: _given(value, absmax, f"{name}.{each}".lstrip("."))
        for each, value in inner.items()
        if value is not None and not isinstance(value, Tensor)
    }
    return replace(part, **inside)


def _absmax(weight: Tensor) -> Tensor:
    """Return the largest magnitude along the last dimension; rounded to float32, it is that of the rounded numbers."""
    lowest, largest = weight.detach().aminmax(dim=-1)
    return torch.maximum(lowest.abs(), largest.abs()).to(torch.float32)
