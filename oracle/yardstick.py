"""The reference as a measure for whole models: the truth, and how wrong eager arithmetic is around it.

One eager run is one sample of a rounding error, and a sample can be zero by luck. In a wide model thousands of
roundings meet in every logit and one run tells their size; in a model of a few hidden elements it does not (with one
run, 0.1 % of the rows of drawn tiny models fail correct variants). There the error is the largest of several runs, in each of which
every number that enters a component is nudged to one of its neighbours at random (Monte Carlo arithmetic: Parker 1997).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.components import DEFAULT, Components
from ..reference.path import ReferencePath
from ..spec.config import Storage
from ..spec.weights import WeightSource

WIDE = 128
"""Hidden elements from which on a single eager run measures the error well."""
RUNS_WHERE_NARROW = 5


@dataclass(frozen=True, slots=True, eq=False)
class Yardstick:
    """The reference on one set of stored weights: what is right, and samples of how wrong eager arithmetic is."""

    truth: ReferencePath
    eager: tuple[ReferencePath, ...]

    @classmethod
    def of(
        cls,
        source: WeightSource,
        *,
        storage: Storage = Storage.FLOAT32,
        compute: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        runs: int | None = None,
    ) -> "Yardstick":
        """Build it from a model; `runs` eager samples, by default 1 for a wide model and 5 for a narrow one."""

        def path(dtype: torch.dtype, components: Components = DEFAULT) -> ReferencePath:
            return ReferencePath(source, storage=storage, compute=dtype, device=device, components=components)

        if runs is None:
            runs = 1 if source.config.hidden >= WIDE else RUNS_WHERE_NARROW
        return cls(path(torch.float64), (path(compute), *(path(compute, nudging(run)) for run in range(1, runs))))


def worst_of(samples: Sequence[Tensor], truth: Tensor) -> Tensor:
    """Element by element, the sample that is furthest from the truth."""
    stacked = torch.stack(list(samples))
    furthest = (stacked.double() - truth).abs().argmax(0, keepdim=True)
    return stacked.gather(0, furthest)[0]


def nudging(seed: int) -> Components:
    """The reference's components, each on inputs nudged to a neighbouring number, or left, at random."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        step = torch.randint(-1, 2, value.shape, generator=generator).to(value.device, value.dtype)
        return value * (1 + step * torch.finfo(value.dtype).eps)

    def on_nudged(component: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any, **options: Any) -> Tensor:
            return component(*(nudge(value) for value in inputs), **options)

        return call

    return replace(
        DEFAULT,
        norm=on_nudged(DEFAULT.norm),
        linear=on_nudged(DEFAULT.linear),
        attention=on_nudged(DEFAULT.attention),
    )
