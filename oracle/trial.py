"""One call of a candidate beside the reference, and what was thought of it.

`Trial` computes each side at most once: the truth (the reference in float64 on the very values the candidate gets), the
eager reference (in the candidate's own dtype), and the candidate. A `Guarantee` looks at a trial and returns a verdict.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..spec.ambient import CPU, pinned
from .case import Case, Inputs


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

    @cached_property
    def exact_inputs(self) -> Inputs:
        """The inputs in float64: every float tensor, and every dtype asked for. The values are unchanged."""

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                return leaf.to(torch.float64)
            return torch.float64 if isinstance(leaf, torch.dtype) else leaf

        return {name: map_leaves(widen, value) for name, value in self.inputs.items()}

    @cached_property
    def truth(self) -> list[Tensor]:
        return self._of_reference(self.exact_inputs)

    @cached_property
    def eager(self) -> list[Tensor]:
        return self._of_reference(self.inputs)

    def _of_reference(self, inputs: Inputs) -> list[Tensor]:
        """Whatever the caller's settings of torch: under autocast eager arithmetic would be wrong by more."""
        with pinned(_device_of(inputs)):
            return leaves(self.reference(**copied(inputs)))

    @cached_property
    def given(self) -> Inputs:
        """What the candidate is handed; afterwards it shows whether the candidate wrote to it."""
        return copied(self.inputs)

    @cached_property
    def got(self) -> list[Tensor]:
        return leaves(self.candidate(**self.given))

    def misfit(self) -> Verdict | None:
        """A failure if the candidate's result cannot be compared at all, or its inputs were written to."""
        if len(self.got) != len(self.eager):
            return failure(f"returns {len(self.got)} tensors, the reference {len(self.eager)}")
        for axes, got, eager in zip(self.outputs, self.got, self.eager, strict=True):
            if got.shape != eager.shape:
                return failure(f"returns shape {list(got.shape)} for [{axes}], the reference {list(eager.shape)}")
            if got.dtype != eager.dtype:
                return failure(f"returns {got.dtype} for [{axes}], the reference {eager.dtype}")
        for name, value in self.inputs.items():
            for before, after in zip(leaves(value), leaves(self.given[name]), strict=True):
                if not same_bits(before, after):
                    return failure(f"writes to its argument {name}, which belongs to the caller")
        return None


class Guarantee(Protocol):
    """What a transformation promises; see `Bitwise`, `Budget`, `Discrete`, `Statistical`."""

    def judge(self, trial: Trial) -> Verdict: ...


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to everything that is not a dataclass, tuple, list or dict, rebuilding those around it."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_leaves(function, getattr(value, f.name)) for f in fields(value) if f.init})
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(function, item) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> list[Tensor]:
    """Every tensor within, in order, in CPU memory; an integer counts as a tensor of no axes."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf.detach().cpu())
        elif isinstance(leaf, int) and not isinstance(leaf, bool):
            found.append(torch.tensor(leaf, device="cpu"))
        return leaf

    map_leaves(note, value)
    return found


def _device_of(inputs: Inputs) -> torch.device:
    """The device of the first tensor, or the CPU."""
    found: list[torch.device] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf.device)
        return leaf

    map_leaves(note, inputs)
    return found[0] if found else CPU


def copied(inputs: Inputs) -> Inputs:
    """The same inputs in memory of their own."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return {name: map_leaves(copy, value) for name, value in inputs.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, and 0.0 is not -0.0.

    >>> same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    True
    >>> same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    False
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_as_bits(a), _as_bits(b))


def _as_bits(value: Tensor) -> Tensor:
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(words[value.element_size()])
