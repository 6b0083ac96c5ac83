"""How small an error the budgets see: the share of cases that alarm when the reference is off by so much.

    python -m twinfer.oracle.resolution [CASES] [OP ...]

prints a line for each op with a budget and each dtype (default 40 cases, a few minutes). Cases whose truth is zero say
nothing, and of bfloat16 those whose inputs are subnormal, which may be read as zero.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from .budget import Budget
from .case import DTYPES, Case, Data, RandomPicker
from .op import Function, Op
from .table import OPS
from .trial import Status, map_leaves

ERRORS = (0.0001, 0.001, 0.01, 0.02, 0.05, 0.2)
PLACES = ("all", "one", "tenth")
"""All elements; the one of middle size; the smallest tenth."""


@dataclass(frozen=True)
class Resolution:
    """The share of cases that alarm, in percent, by place and error."""

    op: str
    dtype: torch.dtype
    cases: int
    alarms: dict[tuple[str, float], float]


def resolution(op: Op, dtype: torch.dtype, cases: int) -> Resolution | None:
    """Judge the reference, made wrong by each error in each place; None where the op never draws the dtype."""
    drawn = list(islice(_cases(op, dtype), cases))
    if not drawn:
        return None
    alarms = {}
    for place in PLACES:
        for error in ERRORS:
            wrong = off_by(op.reference, error, place)
            verdicts = [op.guarantee.judge(op.trial(wrong, case)) for case in drawn]
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


def _cases(op: Op, dtype: torch.dtype) -> Iterator[Case]:
    for seed in islice(count(), 4000):
        case = op.draw(RandomPicker(seed))
        if case.dtype is not dtype or (dtype is torch.bfloat16 and case.data is Data.DENORMAL):
            continue
        truth = op.trial(op.reference, case).truth
        if any(bool((out.nan_to_num() != 0).any()) for out in truth):
            yield case


def main(cases: int = 40, *names: str) -> int:
    header = " ".join(f"{place:>5} {100 * error:g} %" for place in PLACES for error in ERRORS)
    print(f"{'op':20} {'dtype':9} {'cases':>5} {header}")
    for name in names or OPS:
        for dtype in DTYPES if isinstance(OPS[name].guarantee, Budget) else ():
            found = resolution(OPS[name], dtype, cases)
            if found is not None:
                shares = " ".join(f"{share:{len(f'{100 * key[1]:g}') + 8}.0f}" for key, share in found.alarms.items())
                print(f"{name:20} {str(dtype).removeprefix('torch.'):9} {found.cases:5} {shares}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]) if len(sys.argv) > 1 else main())
