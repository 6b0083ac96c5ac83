"""The reference as a measure for whole models: the truth, and how wrong eager arithmetic is around it.

One eager run is one sample of a rounding error, and a sample can be small by luck: in a model of a few hidden
elements 0.1 % of the rows of correct variants fail with one run. There the error is the largest of several runs, in
all but the first of which every number that enters a component is nudged to a neighbor at random (Monte Carlo
arithmetic: Parker 1997). Wide decoders are judged by three, but encoders never: their hidden vectors are the
result, no head sums over them, and of a trained one's, 144 of 3684 rows of a right path fail with one run, and none
with six (the largest is at 0.81).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.components import DEFAULT, Components, Linear
from ..reference.mlp import activation
from ..reference.path import ReferencePath
from ..spec.config import Activation, MlpConfig, Storage
from ..spec.weights import MlpWeights, WeightSource
from .leaning import is_judged

WIDE = 512
"""Hidden elements from which on fewer runs measure the error; of a trained decoder of 128, one fails 2 rows of 929."""
RUNS_WHERE_NARROW = 6
LEANING_RUNS = 2
"""Nudged runs at least, where it is judged how errors lean."""


@dataclass(frozen=True, slots=True, eq=False)
class Baseline:
    """The reference on one set of stored weights: what is right, and samples of how wrong eager arithmetic is."""

    truth: ReferencePath
    eager: tuple[ReferencePath, ...]
    """Those that bound the error of a row; all but the first are nudged."""
    further: tuple[ReferencePath, ...] = ()
    """Nudged runs that say only how errors lean (`leaning`)."""

    @property
    def runs(self) -> tuple[ReferencePath, ...]:
        """All eager runs; each but the first is nudged."""
        return self.eager + self.further

    @classmethod
    def of(
        cls,
        source: WeightSource,
        *,
        storage: Storage = Storage.FLOAT32,
        compute: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        runs: int | None = None,
    ) -> "Baseline":
        """Build it from a model; `runs` eager samples (3 for a wide decoder, 6 for others) share weights.

        One suffices in no arithmetic. In float64 a run that is not nudged is the truth itself; in bfloat16 one is off
        too little by luck in 2 of 28 rows of a trained decoder (a right path's error is 1.6 times the bound).
        """
        if runs is None:
            wide = source.config.hidden >= WIDE and source.config.extensible
            runs = 1 + LEANING_RUNS if wide else RUNS_WHERE_NARROW
        truth, eager = (
            ReferencePath(source, storage=storage, compute=dtype, device=device) for dtype in (torch.float64, compute)
        )
        total = max(runs, 1 + LEANING_RUNS) if is_judged(compute) else runs
        samples = (eager, *(eager.with_components(nudging(run)) for run in range(1, total)))
        return cls(truth, samples[:runs], samples[runs:])


def worst_of(samples: Sequence[Tensor], truth: Tensor) -> Tensor:
    """Element by element, the sample that is furthest from the truth."""
    stacked = torch.stack(list(samples))
    furthest = (stacked.double() - truth).abs().argmax(0, keepdim=True)
    return stacked.gather(0, furthest)[0]


def nudging(seed: int) -> Components:
    """The reference's components, each on inputs nudged up or down to a neighboring number at random."""
    generator = torch.Generator().manual_seed(seed)

    def noise(value: Tensor) -> Tensor:
        """eps or -eps for each element."""
        sign = 2 * torch.randint(0, 2, value.shape, generator=generator).to(value.device, value.dtype) - 1
        return sign * torch.finfo(value.dtype).eps

    def nudge(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value * (1 + noise(value))
        return value

    def on_nudged(component: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Any, **options: Any) -> Tensor:
            return component(*(nudge(value) for value in inputs), **options)

        return call

    def nudged_activation(x: Tensor, kind: Activation) -> Tensor:
        """Tails computed as x * (1 + erf) or x * (1 + tanh) are off by eps * |x|, whatever little is left of them."""
        return activation(x, kind) + (noise(x) * x / 2 if kind is not Activation.RELU else 0)

    def mlp(x_BTM: Tensor, weights: MlpWeights, config: MlpConfig, *, linear: Linear) -> Tensor:
        up_BTF = linear(x_BTM, weights.up)
        if weights.gate is None:
            return linear(nudged_activation(up_BTF, config.activation), weights.down)
        gate_BTF = linear(x_BTM, weights.gate)
        if config.clamp is not None:
            gate_BTF, up_BTF = gate_BTF.clamp(max=config.clamp), up_BTF.clamp(-config.clamp, config.clamp)
        return linear(nudged_activation(gate_BTF, config.activation) * (up_BTF + config.up_offset), weights.down)

    return replace(
        DEFAULT,
        norm=on_nudged(DEFAULT.norm),
        linear=on_nudged(DEFAULT.linear),
        attention=on_nudged(DEFAULT.attention),
        mlp=mlp,
        moe=on_nudged(DEFAULT.moe),
    )
