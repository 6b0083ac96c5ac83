"""One call of a candidate beside the reference, and what was thought of it.

`Trial` computes each side at most once: the truth (the reference in float64 on the very values the candidate gets), the
eager reference (in the candidate's own dtype), and the candidate, which is called after both. A `Guarantee` looks at a
trial and returns a verdict.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec.ambient import pinned
from .case import Case, Inputs
from .process import ProcessState
from .tree import copied as copied
from .tree import device_of, storages_of
from .tree import leaves as leaves
from .tree import map_leaves as map_leaves
from .tree import memory as memory
from .tree import same_bits as same_bits
from .tree import tensors as tensors

THIRD_CALL_EVERY = 3
"""Of so many cases one is called a third time."""


class Arithmetic(StrEnum):
    """What a candidate of a 16-bit output sums in."""

    WIDE = "wide"
    """float32: sums are float32, and only what the reference returns or stores on the way is rounded to 16 bits."""
    NARROW = "narrow"
    """The 16-bit dtype itself: every partial sum may be rounded to it."""


class Status(StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    REJECTED = "rejected"
    """The reference itself overflows on this case and the truth does not: it says nothing about the candidate."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    status: Status
    ratio: float = 0.0
    """Largest error / bound; above 1 fails. Where nothing may differ, 0 or infinite."""
    complaint: str = ""
    """What is wrong, in one line. Empty unless failed."""
    details: tuple[str, ...] = ()
    """Figures, one a line."""
    left_out: int = 0
    """Rows that could not be judged: a decision before them is nearly a tie, and the candidate does not report it."""
    evidence: Tensor | None = None
    """What many cases together may show and this one does not; see `Statistical.pooled`."""

    @property
    def failed(self) -> bool:
        return self.status is Status.FAILED


PASSED = Verdict(status=Status.PASSED)


def failure(complaint: str, *details: str, ratio: float = float("inf")) -> Verdict:
    return Verdict(status=Status.FAILED, ratio=ratio, complaint=complaint, details=details)


@dataclass(frozen=True)
class Trial:
    case: Case
    inputs: Inputs
    """Owned by the trial; every call gets copies."""
    reference: Callable[..., Any]
    candidate: Callable[..., Any]
    outputs: tuple[str, ...]
    """The axes of each tensor that comes out, such as "B T H D"."""
    arithmetic: Arithmetic = Arithmetic.WIDE
    """What the candidate says of its own arithmetic."""
    once: bool = False
    """Call the candidate only on the case's values: a property judges what it returns, not what it does besides."""

    @cached_property
    def exact_inputs(self) -> Inputs:
        """The inputs in float64: every float tensor, and every dtype asked for. The values are unchanged."""
        return {name: map_leaves(_widened, value) for name, value in self.inputs.items()}

    @cached_property
    def sized_inputs(self) -> Inputs:
        """The exact inputs, those that may be read as zero raised to where eps of float32 covers them.

        Products of bfloat16 may read subnormals as zero (x86's AVX512-BF16 and AMX do), which costs up to the smallest
        normal number; so for the sizes of what rounds, each counts as that number over eps.
        """

        if not any(leaf.dtype is torch.bfloat16 for leaf in tensors(self.inputs)):
            return self.exact_inputs

        def size(leaf: Any) -> Any:
            wide = _widened(leaf)
            if not isinstance(leaf, Tensor) or leaf.dtype is not torch.bfloat16:
                return wide
            least = torch.finfo(torch.bfloat16).smallest_normal
            read_as_zero = (wide != 0) & (wide.abs() < least)
            return wide.where(~read_as_zero, wide.sign() * (least / torch.finfo(torch.float32).eps))

        return {name: map_leaves(size, value) for name, value in self.inputs.items()}

    @cached_property
    def truth(self) -> list[Tensor]:
        return leaves(self._of_reference(self.exact_inputs))

    @cached_property
    def eager(self) -> list[Tensor]:
        return leaves(self._eager_result[1])

    def _of_reference(self, inputs: Inputs) -> Any:
        """Whatever the caller's settings of torch: under autocast eager arithmetic would be wrong by more."""
        with pinned(device_of(inputs)):
            return self.reference(**inputs)

    @cached_property
    def got(self) -> list[Tensor]:
        return leaves(self._calls.result)

    def misfit(self) -> Verdict | None:
        """Return a failure if the result cannot be compared at all, or the candidate touched what is not its own."""
        if self._calls.complaint is not None:
            return failure(self._calls.complaint)
        if len(self.got) != len(self.eager):
            return failure(f"returns {len(self.got)} tensors, the reference {len(self.eager)}")
        for axes, got, eager in zip(self.outputs, self.got, self.eager, strict=True):
            if got.shape != eager.shape:
                return failure(f"returns shape {list(got.shape)} for [{axes}], the reference {list(eager.shape)}")
            if got.dtype != eager.dtype:
                return failure(f"returns {got.dtype} for [{axes}], the reference {eager.dtype}")
        return None

    @cached_property
    def _eager_result(self) -> tuple[Inputs, Any]:
        given = copied(self.inputs)
        return given, self._of_reference(given)

    @cached_property
    def _calls(self) -> "Calls":
        """Call the candidate in the same memory on other values, its own, and of every third case the others again.

        A buffer that is used again, or whatever is remembered by address, shows in the second result or in what the
        second call does to the first; whatever depends on how often something was called, in the third, which must
        equal the first, in memory of its own. Truth and eager reference are computed before: what a candidate does to
        the process reaches neither.
        """
        given, eager = self._eager_result
        if self.once:
            return Calls(self.candidate(**copied(self.inputs)))
        may_alias = bool(memory(given) & memory(eager))
        _ = self.truth
        return guarded(
            lambda: _called_in_turn(
                self.candidate,
                self.inputs,
                may_alias=may_alias,
                layout=self.case.seed % 8,
                again=self.case.seed // 8 % THIRD_CALL_EVERY == 0,
            )
        )

    def drawn(self, samples: int) -> "Calls":
        """Call the candidate many times on the same inputs, moving the same generator on; the result is a list."""
        given = copied(self.inputs)

        def draw() -> Calls:
            outcomes = [int(self.candidate(**given)) for _ in range(samples)]
            return Calls(outcomes, _written_to(self.inputs, given, tensors(self.inputs), tensors(given)))

        return guarded(draw)


@dataclass(frozen=True)
class Calls:
    """What came of calling a candidate, and what it did besides."""

    result: Any
    complaint: str | None = None


def guarded(run: Callable[[], Calls]) -> Calls:
    """Run it, put the process back into its state, and complain if it was left in another."""
    before = ProcessState.now()
    try:
        calls = run()
        changes = before.differences(ProcessState.now())
    finally:
        before.restore()
    if changes and calls.complaint is None:
        return replace(calls, complaint=f"changes the state of the process: {'; '.join(changes)}")
    return calls


def _called_in_turn(
    candidate: Callable[..., Any], inputs: Inputs, *, may_alias: bool, layout: int, again: bool
) -> Calls:
    others = _other_values(inputs)
    given = copied(others)
    if layout in _LAYOUTS:
        given = {name: map_leaves(lambda leaf: _strided(leaf, layout), value) for name, value in given.items()}
    places, of_others, of_inputs = tensors(given), tensors(others), tensors(inputs)
    storages = storages_of(places)
    first = candidate(**given)
    complaint = _written_to(others, given, of_others, places)
    held, values = tensors(first), [leaf.clone() for leaf in leaves(first)]
    kept = [tensor.clone() for tensor in held]
    shares = bool(storages_of(held) & storages)
    _fill(places, of_inputs)
    shares = shares or not _all_same_bits(held, kept)
    result = candidate(**{**given, **_generators(inputs)})
    complaint = complaint or _written_to(inputs, given, of_inputs, places)
    if complaint is None and not may_alias:
        if shares:
            complaint = "returns memory of its inputs, which the caller may write to next"
        elif not _all_same_bits(held, kept):
            complaint = "a second call changes what the first returned: results belong to the caller"
        elif any(map(_overlaps, tensors(result))):
            complaint = "two elements of a result are one in memory: the caller may write to each"
    if complaint is None and again:
        if storages_of(tensors(result)) & storages:  # which are written to next
            result = map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)
        _fill(places, of_others)
        third = candidate(**{**given, **_generators(others)})
        if not may_alias and storages_of(held) & memory(third):
            complaint = "two calls return the same memory: results belong to the caller, who may write to them"
        elif not _all_same_bits(values, leaves(third)):
            complaint = "two calls on equal inputs differ: a result depends on what was called before"
    return Calls(result, complaint)


def _all_same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(same_bits, one, other))


def _overlaps(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


_LAYOUTS = (1, 3, 5)


def _strided(leaf: Any, layout: int) -> Any:
    """The same numbers elsewhere in memory.

    Layout 1 leaves gaps, 3 leaves room in front, and 5 keeps another order of the axes.
    """
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    match layout:
        case 1:
            return leaf.new_empty((*leaf.shape, 2))[..., 1].copy_(leaf)
        case 3:
            return leaf.new_empty(16 + leaf.numel())[16:].view(leaf.shape).copy_(leaf)
        case 5:
            return leaf.transpose(0, -1).contiguous().transpose(0, -1)
    return leaf


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return leaf.to(torch.float64)
    return torch.float64 if isinstance(leaf, torch.dtype) else leaf


def _other_values(inputs: Inputs) -> Inputs:
    """Other values of the same kind: each row backwards, floats half as large, and of integers every other tensor.

    (Both factors of a product of integers backwards would give the same product.)
    """
    integers = 0

    def change(leaf: Any) -> Any:
        nonlocal integers
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return leaf
        if leaf.is_floating_point():
            return leaf.flip(-1) * 0.5
        integers += 1
        return leaf.flip(-1) if integers % 2 else leaf

    return {name: map_leaves(change, value) for name, value in inputs.items()}


def _fill(places: list[Tensor], values: list[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def _generators(inputs: Inputs) -> Inputs:
    """Copies of the generators, which a call moves on."""
    return {name: value.clone_state() for name, value in inputs.items() if isinstance(value, torch.Generator)}


def _written_to(inputs: Inputs, given: Inputs, before: list[Tensor], after: list[Tensor]) -> str | None:
    """Name the argument whose tensors are not the same any more."""
    if _all_same_bits(before, after):
        return None
    changed = (name for name, value in inputs.items() if not _all_same_bits(tensors(value), tensors(given[name])))
    return f"writes to its argument {next(changed)}, which belongs to the caller"


class Guarantee(Protocol):
    """What a transformation promises; see `Bitwise`, `Budget`, `Discrete`, `Statistical`."""

    def judge(self, trial: Trial) -> Verdict: ...
