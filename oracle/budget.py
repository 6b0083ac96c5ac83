"""How wrong a floating-point result may be.

    allowed = k * e_ref + c * (u(out) * (|truth| + narrow) + eps(float32) * wide) + jump          k = c = 2

element by element, where u(out) is half of eps(output dtype), the largest relative error of one rounding. `e_ref` is
the error of the eager reference in the candidate's own dtype, measured on the same inputs, so a budget is as strict as
the arithmetic allows: no tolerance is chosen by hand. The rest covers the luck of the draw, since the reference may
happen to be exact where another right implementation is not. docs/equal.md derives it.

A candidate that sums in its 16-bit output dtype says so (`Arithmetic.NARROW`) and is allowed, in each row along axes
that never mix, k * e_ref + c * eps(output dtype) * wide for the largest and for the mean error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .case import Data, Inputs
from .rows import judge_rows, least_scale
from .trial import PASSED, Arithmetic, Status, Trial, Verdict, failure
from .ulp import named_index, p99, ulp


@dataclass(frozen=True)
class Sizes:
    """The sizes of what is rounded on the way to one output; each broadcasts to it."""

    wide: Tensor
    """What is rounded to float32: for a contraction, the same contraction on absolute values."""
    narrow: Tensor | float = 0.0
    """What may be rounded to the output's dtype besides the result, as it reaches the result."""
    jump: Tensor | float = 0.0
    """How far the result moves where a decision on the way is nearly a tie."""
    reach: Tensor | float = 0.0
    """The largest number that is summed or squared on the way, in float32 or wider."""

    def beyond(self, dtype: torch.dtype) -> Tensor:
        """Where a right implementation may leave its range on the way: nothing is said of these elements.

        How a sum is divided decides which of its parts is the largest, so they are those within a factor of 4.
        """
        return torch.as_tensor(self.reach) > torch.finfo(torch.promote_types(dtype, torch.float32)).max / 4


Scale = Callable[[Inputs, list[Tensor]], Sequence[Tensor | Sizes]]
"""From the float64 inputs and the true outputs: for each output its `Sizes`, or `wide` where there is nothing else."""


def size_of_result(exact_inputs: Inputs, truth: list[Tensor]) -> list[Tensor]:
    """Return the scale of element-wise ops: each result rounds by its own size."""
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
    """The axes that never mix, such as "B T H"; whole rows are judged for `Arithmetic.NARROW`, elements otherwise."""
    scale: Scale = size_of_result
    k: float = 2.0
    c: float = 2.0
    exact_on_integers: bool = False
    """Linear parts: on integers no sum rounds, so nothing may differ from the truth."""
    override: Override | None = None

    def __post_init__(self) -> None:
        if (self.k, self.c) != (2.0, 2.0) and self.override is None:
            raise ValueError(f"k is {self.k} and c is {self.c}; other values than 2 need an Override that says why")

    def judge(self, trial: Trial) -> Verdict:
        misfit = trial.misfit()
        if misfit is not None:
            return misfit
        scales = self.scale(trial.sized_inputs, trial.truth)
        sizes_of = [given if isinstance(given, Sizes) else Sizes(given) for given in scales]
        judged = [_within(*each) for each in zip(trial.got, trial.eager, trial.truth, sizes_of, strict=True)]
        if any(overflows(eager, truth) for _, eager, truth in judged):
            return Verdict(status=Status.REJECTED)
        if any(_stored_out_of_range(*each[1:], sizes) for each, sizes in zip(judged, sizes_of, strict=True)):
            return Verdict(status=Status.REJECTED)
        worst = PASSED
        for axes, (got, eager, truth), sizes in zip(trial.outputs, judged, sizes_of, strict=True):
            verdict = self._judge_output(trial, axes, got, eager, truth, sizes)
            if verdict.failed:
                return verdict
            worst = max(worst, verdict, key=lambda seen: seen.ratio)
        return worst

    def _judge_output(
        self, trial: Trial, axes: str, got: Tensor, eager: Tensor, truth: Tensor, sizes: Sizes
    ) -> Verdict:
        if trial.arithmetic is Arithmetic.NARROW:
            return judge_rows(self, axes, got, eager, truth, sizes.wide)
        if self.exact_on_integers and trial.case.data is Data.INTEGER:
            verdict = judge_exact(axes, got, truth, sizes.wide)
            if verdict.failed:
                return verdict
        if got.dtype is torch.bfloat16:
            sizes = replace(sizes, wide=sizes.wide.clamp_min(_flushed(max(trial.case.sizes.values(), default=1))))
        return judge_elements(self, axes, got, eager, truth, sizes)


def _within(got: Tensor, eager: Tensor, truth: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three with zeros where the way leads beyond the range."""
    beyond = sizes.beyond(got.dtype)
    if not beyond.any():
        return got, eager, truth
    return got.masked_fill(beyond, 0.0), eager.masked_fill(beyond, 0.0), truth.masked_fill(beyond, 0.0)


def overflows(eager: Tensor, truth: Tensor) -> bool:
    """Whether the reference leaves its range on the way: it is not finite, or NaN, where the rounded truth is not."""
    rounded = truth.to(eager.dtype)
    lost = (torch.isfinite(rounded) & ~torch.isfinite(eager)) | (rounded.isinf() & eager.isnan())
    return bool(lost.any())


def _flushed(terms: int) -> float:
    """Return the size whose eps of float32 is what so many terms lose where subnormals are written as zero.

    x86's products of bfloat16 do so with every partial sum. No sum has more terms than the longest axis.
    """
    return terms * torch.finfo(torch.bfloat16).smallest_normal / torch.finfo(torch.float32).eps


def _stored_out_of_range(eager: Tensor, truth: Tensor, sizes: Sizes) -> bool:
    """Whether a result leaves its dtype's range where parts of it, of either sign, may have left it before."""
    stores = isinstance(sizes.narrow, Tensor)
    return stores and bool((torch.isfinite(truth) & truth.to(eager.dtype).isinf()).any())


def judge_exact(axes: str, got: Tensor, truth: Tensor, wide: Tensor) -> Verdict:
    """Judge integers that the output's dtype counts without a gap: they must equal the truth.

    Beyond 1 / u = 2 / eps (256 for bfloat16) a partial sum may round to the output's dtype, and budgets apply. 0.0 and
    -0.0 are equal: a sum's sign of zero is free.
    """
    counted = (wide <= 2 / torch.finfo(got.dtype).eps) & (wide == wide.round())
    wrong = counted & ~((got.double() == truth) | (got.isnan() & truth.isnan()))
    if not wrong.any():
        return PASSED
    at = tuple(wrong.nonzero()[0].tolist())
    return failure(
        "differs on integers, where no sum rounds: the logic is wrong, not the arithmetic",
        f"first at   {named_index(axes, at)}: candidate {float(got[at])!r}, truth {float(truth[at])!r}",
        f"wrong      {int(wrong.sum())} of {wrong.numel()} elements",
    )


def judge_elements(budget: Budget, axes: str, got: Tensor, eager: Tensor, truth: Tensor, sizes: Sizes) -> Verdict:
    """Judge one output, element by element; what the truth, rounded to its dtype, has infinite or NaN must be so."""
    rounded = truth.to(got.dtype)
    finite = torch.isfinite(rounded) & torch.isfinite(got)
    verdict = judge_special(axes, got, rounded)
    if verdict.failed or not finite.any():
        return verdict
    limits = torch.finfo(got.dtype)
    sum_eps = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    error = (got.double() - truth).abs()
    reference_error = torch.where(torch.isfinite(eager), (eager.double() - truth).abs(), 0.0)
    narrow = limits.eps / 2 * (truth.abs() + sizes.narrow)
    wide = (sum_eps * sizes.wide).expand_as(truth)
    rounding = (narrow + wide).clamp_min(limits.eps * least_scale(got.dtype))
    bound = budget.k * reference_error + budget.c * rounding + sizes.jump
    ratio = torch.where(finite, error / bound, 0.0)
    wrong = finite & ~(error <= bound)
    if not wrong.any():
        return Verdict(status=Status.PASSED, ratio=float(ratio.max()))

    worst = int(ratio.nan_to_num(torch.inf).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    in_ulps = (error / ulp(truth, got.dtype))[finite]
    jump = torch.as_tensor(sizes.jump, dtype=torch.float64).expand_as(truth)
    return failure(
        f"an error is {float(ratio[at]):.3g} times what the budget allows",
        f"error      max {float(in_ulps.max()):.4g} ulp, mean {float(in_ulps.mean()):.4g} ulp, "
        f"p99 {p99(in_ulps):.4g} ulp (of {got.dtype}, over {in_ulps.numel()} elements)",
        f"worst at   {named_index(axes, at)}: candidate {float(got[at])!r}, truth {float(truth[at])!r}, "
        f"eager reference {float(eager[at])!r}",
        f"bound      {float(bound[at]):.4g} = {budget.k:g} * {float(reference_error[at]):.4g} (eager error) + "
        f"{budget.c:g} * ({float(narrow[at]):.4g} (rounded to {got.dtype}) + {float(wide[at]):.4g} (sums))"
        + (f" + {float(jump[at]):.4g} (ties on the way)" if float(jump[at]) else ""),
        f"wrong      {int(wrong.sum())} of {wrong.numel()} elements",
        ratio=float(ratio[at]),
    )


def judge_special(axes: str, got: Tensor, rounded: Tensor) -> Verdict:
    """Judge where infinities and NaN stand; the largest finite number passes for infinity, which it may round to."""
    finite = torch.isfinite(rounded)
    largest = torch.finfo(got.dtype).max * (1 - torch.finfo(got.dtype).eps)
    as_infinite = rounded.isinf() & (got.sign() == rounded.sign()) & (got.abs() >= largest)
    overflows = got.isinf() & (rounded.abs() >= largest) & (got.sign() == rounded.sign())
    as_finite = finite & (torch.isfinite(got) | overflows)
    wrong = ~(as_infinite | as_finite | (rounded.isnan() & got.isnan()))
    if not wrong.any():
        return PASSED
    at = tuple(wrong.nonzero()[0].tolist())
    return failure(
        f"is {float(got[at])} where the truth is {float(rounded[at])}",
        f"first at   {named_index(axes, at)}, and {int(wrong.sum()) - 1} more of {rounded.numel()} elements",
    )
