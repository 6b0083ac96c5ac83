"""How small an error the budgets see: the share of cases that alarm when the reference is off by so much.

    python -m twinfer.oracle.resolution [CASES] [OP ...]

prints a line for each op with a budget and each dtype (default 40 cases, a few minutes), and again at the sizes of a
real model for those in `LARGE`. Cases whose truth is zero, or lies beyond the range of float32, say nothing, and of
bfloat16 those whose inputs are subnormal, which may be read as zero.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, Sizes
from .case import DTYPES, Case, Data, RandomPicker
from .choices import Chosen, Steered
from .op import Function, Op
from .table import OPS
from .trial import Status, Trial, map_leaves

ERRORS = (0.0001, 0.001, 0.01, 0.02, 0.05, 0.2)
PLACES = ("all", "one", "tenth")
"""All elements; the one of middle size; the smallest tenth."""


LARGE = {
    "linear": {"B": 1, "T": 2, "I": 4096, "N": 64},
    "head_logits": {"B": 1, "T": 2, "M": 4096, "V": 64},
    "rms_norm": {"B": 1, "T": 2, "M": 4096},
    "layer_norm": {"B": 1, "T": 2, "M": 4096},
    "attention": {"B": 1, "T": 4, "S": 64, "H": 4, "K": 2, "D": 128},
}
"""Sizes of a layer of a real model, where sums have many terms."""


@dataclass(frozen=True)
class Resolution:
    """The share of cases that alarm, in percent, by place and error."""

    op: str
    dtype: torch.dtype
    cases: int
    alarms: dict[tuple[str, float], float]


def resolution(op: Op, dtype: torch.dtype, cases: int, sizes: Mapping[str, int] | None = None) -> Resolution | None:
    """Judge the reference, made wrong by each error in each place; None where the op never draws the dtype.

    With `sizes`, every case has these.
    """
    drawn = list(islice(_cases(op, dtype, sizes), cases))
    if not drawn:
        return None
    alarms = {}
    for place in PLACES:
        for error in ERRORS:
            wrong = off_by(op.reference, error, place)
            verdicts = [op.guarantee.judge(op.trial(wrong, case, once=True)) for case in drawn]
            judged = [verdict for verdict in verdicts if verdict.status is not Status.REJECTED]
            alarms[place, error] = 100 * sum(verdict.failed for verdict in judged) / max(1, len(judged))
    return Resolution(op.name, dtype, len(drawn), alarms)


def off_by(function: Function, error: float, place: str) -> Callable[..., Any]:
    """The function with every output off by this factor, less one, in the named place."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        out = leaf.double().flatten()
        order = out.abs().nan_to_num(torch.inf).sort().indices
        match place:
            case "all":
                chosen = order
            case "one":
                chosen = order[len(order) // 2 :][:1]
            case _:
                chosen = order[: max(1, len(order) // 10)]
        out[chosen] *= 1 + error
        return out.view(leaf.shape).to(leaf.dtype)

    return lambda **inputs: map_leaves(change, function(**inputs))


def _cases(op: Op, dtype: torch.dtype, sizes: Mapping[str, int] | None) -> Iterator[Case]:
    for seed in islice(count(), 4000):
        case = op.draw(RandomPicker(seed))
        case = case if sizes is None else replace(case, sizes=sizes)
        if case.dtype is not dtype or (dtype is torch.bfloat16 and case.data is Data.DENORMAL):
            continue
        trial = op.trial(op.reference, case)
        if any(bool((out.nan_to_num() != 0).any()) for out in judged(op, trial)):
            yield case


def judged(op: Op, trial: Trial) -> list[Tensor]:
    """The true outputs as rounded, with zeros where nothing is said of a result."""
    assert isinstance(op.guarantee, Budget), "only errors within a budget have a size"
    sizes = op.guarantee.scale(trial.sized_inputs, trial.truth)
    pairs = zip(trial.truth, trial.eager, sizes, strict=True)
    return [
        (truth.masked_fill(each.beyond(eager.dtype), 0.0) if isinstance(each, Sizes) else truth).to(eager.dtype)
        for truth, eager, each in pairs
    ]


def _print(found: Resolution, name: str) -> None:
    shares = " ".join(f"{share:{len(f'{100 * key[1]:g}') + 8}.0f}" for key, share in found.alarms.items())
    print(f"{name:20} {str(found.dtype).removeprefix('torch.'):9} {found.cases:5} {shares}", flush=True)


def main(cases: int = 40, *names: str) -> int:
    header = " ".join(f"{place:>5} {100 * error:g} %" for place in PLACES for error in ERRORS)
    print(f"{'op':20} {'dtype':9} {'cases':>5} {header}")
    for name in names or OPS:
        for sizes in (None, *([LARGE[name]] if name in LARGE else [])):
            for dtype in DTYPES if isinstance(OPS[name].guarantee, Budget | Chosen | Steered) else ():
                found = resolution(OPS[name], dtype, cases, sizes)
                if found is not None:
                    _print(found, name if sizes is None else f"{name}, large")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]) if len(sys.argv) > 1 else main())
