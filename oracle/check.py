"""Holding anyone's implementation of an op against the reference: what `twinfer check` and `twinfer ops` do.

An implementation is a function that takes the op's arguments by keyword and returns what the reference returns:

    def attention(*, query_BTHD, key_BSKD, value_BSKD, visible_TS, scale): ...
"""

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..spec.errors import RequestError
from . import choices, guarantees
from .assertion import Mismatch, assert_matches_reference, assert_obeys, import_of, reproduction
from .budget import Budget
from .case import Case, RandomPicker
from .op import PROPERTIES_EVERY, Function, Op
from .search import drawn, smallest
from .table import OPS, op_named
from .trial import Arithmetic, Status


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What came of holding an implementation against an op's guarantee."""

    op: str
    implementation: str
    holds: bool
    cases: int
    """Drawn and judged, those of the search for the smallest failing one included."""
    rejected: int
    """Of these, cases on which the reference itself overflows."""
    largest_ratio: float
    """Largest error / bound among the cases that passed: how near it came."""
    left_out: int = 0
    """Rows that could not be judged, since a decision before them is nearly a tie."""
    report: str | None = None
    """Where it fails: what is wrong with the smallest failing case, in words and figures."""
    smallest: str | None = None
    """That case, as Python."""
    snippet: str | None = None
    """Python that fails in the same way when pasted."""


@dataclass(frozen=True, kw_only=True)
class OpRow:
    """One line of the table of ops."""

    name: str
    axes: str
    arguments: tuple[str, ...]
    """What an implementation is called with, by keyword."""
    outputs: tuple[str, ...]
    """The axes of each tensor that it returns."""
    guarantee: str
    paper: str
    fast: tuple[str, ...]
    """The paths that have a fast twin of it."""
    no_fast: str | None


def check_op(
    op_name: str,
    implementation: Function,
    max_examples: int = 1000,
    *,
    seed: int = 0,
    named: str | None = None,
    arithmetic: Arithmetic = Arithmetic.WIDE,
    options: Sequence[str] = (),
) -> CheckResult:
    """Try an implementation on drawn cases, and make the first that fails as small as it can be.

    Every tenth case is also held against the op's properties. Raises `RequestError` for an unknown op or option, or
    fewer than one example.
    """
    op = op_named(op_name).under(*options)
    if max_examples < 1:
        raise RequestError(f"max_examples is {max_examples}; it must be at least 1")
    name: str = named or getattr(implementation, "__qualname__", None) or repr(implementation)
    tally = _Tally(op, implementation, import_of(implementation), arithmetic)
    for number in range(max_examples):
        case, indices = drawn(op, seed, number)
        laws = number % PROPERTIES_EVERY == 0
        if tally.failure(case, laws=laws) is not None:
            found = smallest(op, indices, lambda case, laws=laws: tally.failure(case, laws=laws) is not None)  # type: ignore[misc]
            failed = tally.failure(found, laws=laws)
            report = "fails now and then: not once on the same case" if failed is None else _explain(failed)
            return tally.result(name, holds=False, report=report, smallest=found, last=failed)
    if isinstance(op.guarantee, guarantees.Statistical):
        pooled = op.guarantee.pooled(tally.evidence)
        if pooled.failed:
            return tally.result(name, holds=False, report="\n  ".join([pooled.complaint, *pooled.details]))
    return tally.result(name, holds=True)


class _Tally:
    """Runs an implementation case by case, and keeps count."""

    def __init__(self, op: Op, implementation: Function, binding: str, arithmetic: Arithmetic) -> None:
        self.op = op
        self.implementation = implementation
        self.binding = binding
        self.arithmetic = arithmetic
        self.evidence: list[Tensor] = []
        self.cases = self.rejected = 0
        self.largest_ratio = 0.0
        self.left_out = 0

    def failure(self, case: Case, *, laws: bool) -> Exception | None:
        """Judge the implementation on the case, and by the op's properties if asked to; what it fails with, if so."""
        self.cases += 1
        binding, arithmetic = self.binding, self.arithmetic
        try:
            verdict = assert_matches_reference(self.op, self.implementation, case, named=binding, arithmetic=arithmetic)
            if laws and verdict.status is not Status.REJECTED:
                assert_obeys(self.op, self.implementation, case, named=binding)
        except Exception as failed:
            return failed
        self.rejected += verdict.status is Status.REJECTED
        self.largest_ratio = max(self.largest_ratio, verdict.ratio)
        self.left_out += verdict.left_out
        if verdict.evidence is not None:
            self.evidence.append(verdict.evidence)
        return None

    def result(
        self,
        name: str,
        *,
        holds: bool,
        report: str | None = None,
        smallest: Case | None = None,
        last: Exception | None = None,
    ) -> CheckResult:
        snippet = None if smallest is None else reproduction(self.op, smallest, self.binding, self.arithmetic)
        return CheckResult(
            op=self.op.name,
            implementation=name,
            holds=holds,
            cases=self.cases,
            rejected=self.rejected,
            largest_ratio=self.largest_ratio,
            left_out=self.left_out,
            report=report,
            smallest=None if smallest is None else repr(smallest),
            snippet=last.snippet if isinstance(last, Mismatch) else snippet,
        )


def _explain(failure: Exception) -> str:
    """The report of a mismatch; for an implementation that raises, what and where."""
    if isinstance(failure, Mismatch):
        return str(failure)
    frames = traceback.extract_tb(failure.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"the implementation raises {type(failure).__name__}: {failure}{where}"


def load_implementation(name: str) -> Function:
    """The function that `package.module:function` names; the current folder is searched too.

    Raises `RequestError` where there is no such module or function, or it cannot be called.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise RequestError(f"the implementation is {name!r}; it must read package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RequestError(
            f"the module {module_name!r} of {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function: object = module
    for part in function_name.split("."):
        if not hasattr(function, part):
            raise RequestError(f"the module {module_name!r} has no {function_name!r}; check the name after the colon")
        function = getattr(function, part)
    if not callable(function):
        raise RequestError(f"{name!r} is {type(function).__name__}, which cannot be called; give a function")
    return function


def ops_table() -> list[OpRow]:
    """Every op, in the order in which a token meets them."""
    return [
        OpRow(
            name=op.name,
            axes=op.axes,
            arguments=arguments(op),
            outputs=op.outputs,
            guarantee=described(op),
            paper=op.paper,
            fast=tuple(str(path) for path in op.fast),
            no_fast=op.no_fast,
        )
        for op in OPS.values()
    ]


def arguments(op: Op) -> tuple[str, ...]:
    """The names by which an implementation of the op is called.

    >>> arguments(OPS["attention"])
    ('query_BTHD', 'key_BSKD', 'value_BSKD', 'visible_TS', 'scale')
    """
    return tuple(op.inputs(op.cases(RandomPicker(0))))


def described(op: Op) -> str:
    """The guarantee in one line.

    >>> described(OPS["attention"])
    'BUDGET by elements'
    """
    match op.guarantee:
        case Budget() as budget:
            exact = ", exact on integers" if budget.exact_on_integers else ""
            return f"BUDGET by elements{exact}"
        case guarantees.Bitwise():
            return "BITWISE"
        case guarantees.Discrete():
            return "DISCRETE"
        case guarantees.Statistical() as tested:
            return f"STATISTICAL over {tested.samples} draws a case, pooled over all"
        case choices.Chosen():
            return "DISCRETE experts, BUDGET for their weights"
        case choices.Steered():
            return "BUDGET by elements, on experts chosen DISCRETE"
    raise TypeError(f"op {op.name} has the unknown guarantee {type(op.guarantee).__name__}")
