"""How wrong a floating-point result may be.

    allowed = k * e_ref + c * eps(output dtype) * scale          k = c = 2

`e_ref` is the error of the eager reference in the candidate's own dtype, measured on the same inputs, so a budget is as
strict as the arithmetic allows: no tolerance is chosen by hand. The second term covers the luck of the draw, since the
reference may happen to be exact where another order of summation is not; `scale` is the size of what is rounded on the
way (for a contraction, the same contraction on absolute values), not of the result, which may have cancelled.

Errors are judged row by row along axes that never mix, the largest and the mean of each row: beside a huge row, a
small one that is 3 % off would disappear in any norm taken over both.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Data, Inputs
from .trial import PASSED, Status, Trial, Verdict, failure
from .ulp import ulp

Scale = Callable[[Inputs, list[Tensor]], list[Tensor]]
"""From the float64 inputs and the true outputs: for each output, a tensor that broadcasts to it."""


def size_of_result(exact_inputs: Inputs, truth: list[Tensor]) -> list[Tensor]:
    """The scale of element-wise ops: each result rounds by its own size."""
    return [result.abs() for result in truth]


@dataclass(frozen=True, kw_only=True)
class Override:
    """Why a budget departs from k = c = 2."""

    reason: str
    derivation: str
    """Where the new factors come from."""
    measured: float
    """The largest error / bound (at k = c = 2) seen in a correct implementation."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Errors against the float64 truth, bounded by a multiple of the eager reference's own."""

    rows: str
    """The axes that never mix, such as "B T H"."""
    scale: Scale = size_of_result
    k: float = 2.0
    c: float = 2.0
    exact_on_integers: bool = False
    """Linear parts: on integer data no sum rounds, so nothing may differ from the correctly rounded truth."""
    override: Override | None = None

    def __post_init__(self) -> None:
        if (self.k, self.c) != (2.0, 2.0) and self.override is None:
            raise ValueError(f"k is {self.k} and c is {self.c}; other values than 2 need an Override that says why")

    def judge(self, trial: Trial) -> Verdict:
        misfit = trial.misfit()
        if misfit is not None:
            return misfit
        if any(overflows(eager, truth) for eager, truth in zip(trial.eager, trial.truth, strict=True)):
            return Verdict(status=Status.REJECTED)
        if self.exact_on_integers and trial.case.data is Data.INTEGER:
            return judge_exact(trial)
        scales = self.scale(trial.exact_inputs, trial.truth)
        worst = PASSED
        for axes, got, eager, truth, scale in zip(
            trial.outputs, trial.got, trial.eager, trial.truth, scales, strict=True
        ):
            verdict = judge_rows(self, axes, got, eager, truth, scale)
            worst = max(worst, verdict, key=lambda seen: seen.ratio)
        return worst


def overflows(eager: Tensor, truth: Tensor) -> bool:
    """Whether the reference itself is not finite where the truth is."""
    return bool((torch.isfinite(truth) & ~torch.isfinite(eager)).any())


def judge_exact(trial: Trial) -> Verdict:
    """Every output must equal the truth, correctly rounded. (0.0 and -0.0 are equal: a sum's sign of zero is free.)"""
    for axes, got, truth in zip(trial.outputs, trial.got, trial.truth, strict=True):
        wanted = truth.to(got.dtype)
        wrong = ~((got == wanted) | (got.isnan() & wanted.isnan()))
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            return failure(
                "differs on integers, where no sum rounds: the logic is wrong, not the arithmetic",
                f"first at   {named_index(axes, at)}: candidate {float(got[at])!r}, truth {float(wanted[at])!r}",
                f"wrong      {int(wrong.sum())} of {wrong.numel()} elements",
            )
    return PASSED


def least_scale(dtype: torch.dtype) -> float:
    """Nothing rounds to finer steps than the subnormals', so no scale is smaller than the smallest normal number.

    Of bfloat16 processors need not have subnormals: x86's products (AVX512-BF16, AMX) read and write them as zero,
    whatever their mode. So its steps are no finer than the smallest normal number itself.

    >>> least_scale(torch.float32) == 2**-126, least_scale(torch.bfloat16) == 2**-126 * 2**7
    (True, True)
    """
    limits = torch.finfo(dtype)
    return limits.smallest_normal / (limits.eps if dtype is torch.bfloat16 else 1.0)


def judge_rows(budget: Budget, axes: str, got: Tensor, eager: Tensor, truth: Tensor, scale: Tensor) -> Verdict:
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
        ratio = reduce(error) / bound
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
        f"p99 {float(in_ulps.quantile(0.99)):.4g} ulp (of {got.dtype}, over {in_ulps.numel()} elements)",
        f"worst at   {named_index(axes, where)}: candidate {float(got[where])!r}, truth {float(truth[where])!r}, "
        f"eager reference {float(eager[where])!r}",
        f"row bound  {name} {bound_of_row:.4g} = {budget.k:g} * {eager_of_row:.4g} (eager error) + "
        f"{budget.c:g} * {limits.eps:.3g} (eps) * {scale_of_row:.4g} (scale)",
        ratio=largest,
    )


def named_index(axes: str, index: tuple[int, ...]) -> str:
    """An index with its axes' names.

    >>> named_index("B T H", (0, 3, 1))
    'B=0 T=3 H=1'
    """
    return " ".join(f"{axis}={i}" for axis, i in zip(axes.split(), index, strict=True)) or "the only element"


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
