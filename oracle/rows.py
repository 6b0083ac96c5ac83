"""Errors judged row by row: the largest and the mean of each row along axes that never mix.

Beside a huge row, a small one that is 3 % off would disappear in any norm taken over both. Whole models are judged so,
and ops whose candidate sums in its 16-bit output dtype.

    allowed = k * e_ref + c * eps(output dtype) * scale
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .trial import PASSED, Status, Verdict, failure
from .ulp import named_index, p99, ulp


class Factors(Protocol):
    """What a budget says of rows."""

    @property
    def rows(self) -> str: ...
    @property
    def k(self) -> float: ...
    @property
    def c(self) -> float: ...


def least_scale(dtype: torch.dtype) -> float:
    """Nothing rounds to finer steps than the subnormals', so no scale is smaller than the smallest normal number.

    Of bfloat16 processors need not have subnormals: x86's products (AVX512-BF16, AMX) read and write them as zero,
    whatever their mode. So its steps are no finer than the smallest normal number itself.

    >>> least_scale(torch.float32) == 2**-126, least_scale(torch.bfloat16) == 2**-126 * 2**7
    (True, True)
    """
    limits = torch.finfo(dtype)
    return limits.smallest_normal / (limits.eps if dtype is torch.bfloat16 else 1.0)


def judge_rows(budget: Factors, axes: str, got: Tensor, eager: Tensor, truth: Tensor, scale: Tensor) -> Verdict:
    """Judge one output. Where the truth is infinite or NaN the candidate must be so too, and the rest is judged."""
    finite = torch.isfinite(truth)
    wrong_kind = torch.where(finite, ~torch.isfinite(got), ~((got.double() == truth) | (got.isnan() & truth.isnan())))
    if wrong_kind.any():
        where = tuple(wrong_kind.nonzero()[0].tolist())
        return failure(
            f"is {float(got[where])} where the truth is {float(truth[where])}",
            f"first at   {named_index(axes, where)}, and {int(wrong_kind.sum()) - 1} more of {truth.numel()} elements",
        )
    if truth.numel() == 0:
        return PASSED
    limits = torch.finfo(got.dtype)
    row_axes = [axis for axis in axes.split() if axis in budget.rows.split()]

    def rows(value: Tensor) -> Tensor:
        return _as_rows(torch.where(finite, value, 0.0), axes.split(), row_axes)

    error = rows((got.double() - truth).abs())
    reference_error = rows((eager.double() - truth).abs())
    scale = rows(scale.expand_as(truth)).clamp_min(least_scale(got.dtype))
    ratios = []
    reductions: dict[str, Callable[[Tensor], Tensor]] = {"max": lambda x: x.amax(-1), "mean": lambda x: x.mean(-1)}
    for name, reduce in reductions.items():
        bound = budget.k * reduce(reference_error) + budget.c * limits.eps * reduce(scale)
        ratio = (reduce(error) / bound).nan_to_num(nan=torch.inf, posinf=torch.inf)  # no number is no proof
        row = int(ratio.argmax())
        terms = (float(bound[row]), float(reduce(reference_error)[row]), float(reduce(scale)[row]))
        ratios.append((float(ratio[row]), name, row, terms))
    largest, name, row, (bound_of_row, eager_of_row, scale_of_row) = max(ratios)
    if largest <= 1:
        return Verdict(status=Status.PASSED, ratio=largest)

    row_shape = [size for axis, size in zip(axes.split(), truth.shape, strict=True) if axis in row_axes]
    row_index = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), row_shape)) if row_shape else ()
    in_row = _row_mask(truth, axes.split(), row_axes, row_index)
    error = torch.where(finite & in_row, (got.double() - truth).abs(), -1.0)
    where = tuple(int(i) for i in torch.unravel_index(error.argmax(), truth.shape))
    in_ulps = ((got.double() - truth).abs() / ulp(truth, got.dtype))[finite]
    row_name = named_index(" ".join(row_axes), row_index) if row_axes else "of everything"
    return failure(
        f"the {name} error of row {row_name} is {largest:.3g} times what the budget allows",
        f"error      max {float(in_ulps.max()):.4g} ulp, mean {float(in_ulps.mean()):.4g} ulp, "
        f"p99 {p99(in_ulps):.4g} ulp (of {got.dtype}, over {in_ulps.numel()} elements)",
        f"worst at   {named_index(axes, where)}: candidate {float(got[where])!r}, truth {float(truth[where])!r}, "
        f"eager reference {float(eager[where])!r}",
        f"row bound  {name} {bound_of_row:.4g} = {budget.k:g} * {eager_of_row:.4g} (eager error) + "
        f"{budget.c:g} * {limits.eps:.3g} (eps) * {scale_of_row:.4g} (scale)",
        ratio=largest,
    )


def _as_rows(value: Tensor, axes: list[str], row_axes: list[str]) -> Tensor:
    """The tensor as [rows, elements of a row]."""
    order = [axes.index(axis) for axis in row_axes] + [i for i, axis in enumerate(axes) if axis not in row_axes]
    row_count = 1
    for axis in row_axes:
        row_count *= value.shape[axes.index(axis)]
    return value.permute(order).reshape(row_count, -1)


def _row_mask(value: Tensor, axes: list[str], row_axes: list[str], row_index: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(value.shape, dtype=torch.bool)
    chosen = dict(zip(row_axes, row_index, strict=True))
    mask[tuple(chosen.get(axis, slice(None)) for axis in axes)] = True
    return mask
