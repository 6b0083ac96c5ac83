"""The record of an op: one place that says what it is, what it must equal, and what it costs.

Tests, the benchmark, the tables in the docs and the `check` command all iterate over these records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from ..spec.decoder import Path
from ..spec.errors import RequestError
from .case import Case, Inputs, Picker
from .trial import Arithmetic, Guarantee, Trial

Function = Callable[..., Any]
PROPERTIES_EVERY = 10
"""Cases from one that is held against the op's properties to the next: each property is a few calls more."""


@dataclass(frozen=True)
class Fast:
    """A fast callable, and how to call it like the reference."""

    function: Function
    """The function that the path's graph calls."""
    adapt: Callable[[Function, Inputs], Any]
    """Packs the case's inputs as the function wants them, calls it, and returns the outputs in the reference's form.

    The function is an argument so that a test may hand in a compiled version of it.
    """
    applies: Callable[[Inputs], bool] = lambda inputs: True
    """Whether the path ever calls the function on such inputs."""

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))

    def __call__(self, **inputs: Any) -> Any:
        return self.adapt(self.function, inputs)


Convention = Mapping[str, Any] | Callable[["Op"], Mapping[str, Any]]
"""Fields of an op that are others, or how they follow from the op's under the options before it."""
Property = Callable[["Op", Function, Case], None]
"""What an implementation must obey by itself: raises AssertionError where it does not. The docstring states it."""


@dataclass(frozen=True, kw_only=True)
class Op:
    name: str
    paper: str
    """The section of the DeepSpeed Inference paper that describes it; "-" where it takes it for granted."""
    axes: str
    """Letters of the symbolic axes, as the reference's legend explains them."""
    reference: Function
    """Called with keyword arguments; so is every other implementation."""
    outputs: tuple[str, ...]
    """The axes of each tensor that comes out, in order."""
    cases: Callable[[Picker], Case]
    inputs: Callable[[Case], Inputs]
    guarantee: Guarantee
    variants: Mapping[str, Function]
    """Other correct implementations, which sum in other orders: the guarantee must let them pass."""
    mutants: Mapping[str, Function]
    """Seeded faults: the guarantee must catch each of them."""
    flops: Callable[[SimpleNamespace], int]
    """Floating-point operations, from the sizes: a multiplication and an addition count one each."""
    bytes: Callable[[SimpleNamespace], int]
    """Bytes read and written where each float32 input is read once and each output written once."""
    properties: tuple[Property, ...] = ()
    fast: Mapping[Path, tuple[Fast, ...]] = field(default_factory=dict)
    """For each path, the functions that do this op in its graphs: one for decoding, another for prefill."""
    no_fast: str | None = None
    """Why there is no fast twin."""
    larger: Callable[[Case, Picker], Case] | None = None
    """The case with some sizes around the borders where implementations change: tiles, vectors, passes."""
    conventions: Mapping[str, "Convention"] = field(default_factory=dict)
    """Where public code rightly differs: by option, such as "ties=any", the fields that are then others."""
    chosen: tuple[str, ...] = ()
    """The options under which this record stands."""

    def __post_init__(self) -> None:
        if bool(self.fast) == bool(self.no_fast):
            raise ValueError(f"op {self.name}: give either fast callables or the reason why there is none")

    def draw(self, pick: Picker) -> Case:
        """Draw a case; one in ten has larger sizes."""
        larger = pick.integer(0, 9) == 9
        case = self.cases(pick)
        return self.larger(case, pick) if larger and self.larger is not None else case

    def under(self, *options: str) -> "Op":
        """The record under other conventions; raises `RequestError` for an option that the op does not have."""
        op = self
        for option in options:
            if option not in self.conventions:
                known = ", ".join(self.conventions) or "none"
                raise RequestError(f"the option is {option!r}; those of {self.name} are: {known}")
            change = self.conventions[option]
            op = replace(op, **(change(op) if callable(change) else change), chosen=(*op.chosen, option))
        return op

    def trial(
        self, candidate: Function, case: Case, arithmetic: Arithmetic = Arithmetic.WIDE, *, once: bool = False
    ) -> Trial:
        return Trial(case, self.inputs(case), self.reference, candidate, self.outputs, arithmetic, once)
