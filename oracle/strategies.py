"""The drawing of cases, as Hypothesis strategies.

Hypothesis is an extra (`pip install 'twinfer[oracle]'`) that only tests need; this is the one module that imports it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..spec.errors import MachineError
from .case import Case, Choice, Picker
from .op import Op

try:
    from hypothesis import strategies as st
except ImportError:
    raise MachineError(
        "drawing cases by Hypothesis needs the package hypothesis, which is not installed; "
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
    return drawn(op.draw)
