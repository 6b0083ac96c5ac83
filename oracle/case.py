"""What an op is tried on: a few small integers, a seed and a kind of data, from which every tensor is built.

Nothing random is stored and no float is drawn, so a case prints in one line, shrinks well, and is the same on every
machine. Tensors are rounded to the case's dtype when they are built: the float64 truth is computed from what the
candidate really gets.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Choice = TypeVar("Choice")
Option = bool | int | float | str | None
Inputs = dict[str, Any]
"""The keyword arguments of one call: tensors, weights dataclasses, enums, numbers."""


class Data(StrEnum):
    """What the numbers of a case are like."""

    NORMAL = "normal"
    """Standard normal."""
    LARGE = "large"
    """Normal, about half of the rows a thousand times larger than their neighbors."""
    CANCELING = "canceling"
    """The second half of each activation row nearly undoes the first, so sums are small beside their terms."""
    CONSTANT = "constant"
    """One value all along each row: nothing varies, so variances vanish."""
    ZEROS = "zeros"
    DENORMAL = "denormal"
    """Activations around and below the smallest normal number of the dtype."""
    MASKED = "masked"
    """Normal, and some queries may see no key at all. Only for ops with a mask."""
    OFFSET = "offset"
    """Normal about a mean of 300 (30 for float16): what is left of a row without its mean is small beside it."""
    TIES = "ties"
    """Five values only, zeros of both signs among them, so that much is equal."""
    HUGE = "huge"
    """Normal, half of the rows times 1e19 (float16: 1024), whose squares leave the range, the rest times 1e8 (32)."""
    INTEGER = "integer"
    """Small integers (half-integers where rounding is the matter): every partial sum of a product is exact."""


UNMASKED = tuple(kind for kind in Data if kind is not Data.MASKED)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One drawn input of one op. Its repr is Python that makes it again."""

    op: str
    sizes: Mapping[str, int]
    """Size of each symbolic axis, by its letter."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Everything else that was chosen: conventions, parameters, whether a bias is there."""
    data: Data = Data.NORMAL
    dtype: torch.dtype = torch.float32
    seed: int = 0

    @property
    def n(self) -> SimpleNamespace:
        """The sizes as attributes: `case.n.B`."""
        return SimpleNamespace(**self.sizes)

    def generator(self, name: str) -> torch.Generator:
        """A generator of its own for each tensor, so that adding one leaves the others as they were."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def __repr__(self) -> str:
        return (
            f"Case(op={self.op!r}, sizes={dict(self.sizes)!r}, options={dict(self.options)!r}, "
            f"data=Data.{self.data.name}, dtype={self.dtype}, seed={self.seed})"
        )


class Picker(Protocol):
    """Where choices come from: Hypothesis, which shrinks them, or a plain seeded generator, which is fast."""

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included; the simplest is low."""
        ...

    def choice(self, options: Sequence[Choice]) -> Choice:
        """One of the options; the simplest is the first."""
        ...


class RandomPicker:
    """Choices from a seed, uniformly, without Hypothesis."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def choice(self, options: Sequence[Choice]) -> Choice:
        return self._random.choice(options)


def activations(case: Case, name: str, *shape: int, large: int = 10, squared: bool = False) -> Tensor:
    """A tensor of the case's kind and dtype; rows run along the last axis. LARGE rows are 2 ** large times larger.

    Where the op stores squares or products of them (`squared`), all HUGE rows are of the lesser size.
    """
    generator = case.generator(name)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    match case.data:
        case Data.NORMAL | Data.MASKED:
            drawn = normal
        case Data.LARGE:
            is_large = torch.rand((*shape[:-1], 1), generator=generator) < 0.5
            drawn = torch.where(
                is_large, normal * 2.0 ** (min(large, 5) if case.dtype is torch.float16 else large), normal
            )
        case Data.CANCELING:
            drawn = _second_half_undoes_first(normal)
        case Data.CONSTANT:
            drawn = normal[..., :1].expand(shape)
        case Data.ZEROS:
            drawn = torch.zeros_like(normal)
        case Data.DENORMAL:
            drawn = normal * torch.finfo(case.dtype).smallest_normal
        case Data.OFFSET:
            drawn = normal + (30 if case.dtype is torch.float16 else 300)
        case Data.TIES:
            drawn = torch.randint(-2, 3, shape, generator=generator).to(torch.float64) / 2
            drawn = torch.where((drawn == 0) & (normal < 0), -0.0, drawn)
        case Data.HUGE:
            greater, lesser = (2.0**10, 2.0**5) if case.dtype is torch.float16 else (1e19, 1e8)
            is_greater = (torch.rand((*shape[:-1], 1), generator=generator) < 0.5) & (not squared)
            drawn = normal * torch.where(is_greater, greater, lesser)
        case Data.INTEGER:
            drawn = torch.randint(-4, 5, shape, generator=generator).to(torch.float64)
    return drawn.to(case.dtype)


def parameters(case: Case, name: str, *shape: int, spread: float = 1.0) -> Tensor:
    """A weight tensor: normal, except that INTEGER draws integers and CANCELING repeats the first half of each row."""
    generator = case.generator(name)
    if case.data is Data.INTEGER:
        return torch.randint(-4, 5, shape, generator=generator).to(case.dtype)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    if case.data is Data.CANCELING:
        half = shape[-1] // 2
        drawn[..., half : 2 * half] = drawn[..., :half]
    return drawn.to(case.dtype)


def _second_half_undoes_first(normal: Tensor) -> Tensor:
    half = normal.shape[-1] // 2
    drawn = normal.clone()
    drawn[..., half : 2 * half] = -normal[..., :half] * (1 + normal[..., half : 2 * half] * 2.0**-10)
    return drawn
