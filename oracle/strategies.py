"""The drawing of cases, as Hypothesis strategies.

Hypothesis is an extra (`pip install 'twinfer[oracle]'`) that the tests and the `check` command need; this is the one
module that imports it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..spec.errors import MachineError
from .case import Case, Choice, Picker
from .op import Op

try:
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from hypothesis import strategies as st
except ImportError:
    raise MachineError(
        "holding an implementation against the reference needs the package hypothesis, which is not installed; "
        "install it with: pip install 'twinfer[oracle]'"
    ) from None

Drawn = TypeVar("Drawn")


class HypothesisPicker:
    """Choices drawn by Hypothesis, each of which it can shrink."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def choice(self, options: Sequence[Choice]) -> Choice:
        return self._draw(st.sampled_from(options))


def drawn(build: Callable[[Picker], Drawn]) -> st.SearchStrategy[Drawn]:
    """Whatever a function builds from a picker, as a strategy."""

    @st.composite
    def strategy(draw: st.DrawFn) -> Drawn:
        return build(HypothesisPicker(draw))

    return strategy()


def cases(op: Op) -> st.SearchStrategy[Case]:
    """The cases of an op."""
    return drawn(op.cases)


def search(op: Op, trial: Callable[[Case], None], *, max_examples: int, start: int) -> None:
    """Call `trial` on drawn cases; if one raises, find the smallest that does and raise what that one raises."""

    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
    )
    @seed(start)
    @given(cases(op))
    def run(case: Case) -> None:
        trial(case)

    run()
