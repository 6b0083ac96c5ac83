"""Holding anyone's implementation of an op against the reference: what `twinfer check` and `twinfer ops` do.

An implementation is a function that takes the op's arguments by keyword and returns what the reference returns:

    def attention(*, query_BTHD, key_BSKD, value_BSKD, visible_TS, scale): ...
"""

import importlib
import os
import sys
import traceback
from dataclasses import dataclass

from ..spec.errors import RequestError
from . import guarantees
from .assertion import Mismatch, assert_matches_reference, import_of, reproduction
from .budget import Budget
from .case import Case, RandomPicker
from .op import Function, Op
from .table import OPS, op_named
from .trial import Status


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
    op_name: str, implementation: Function, max_examples: int = 200, *, seed: int = 0, named: str | None = None
) -> CheckResult:
    """Try an implementation on drawn cases, and shrink to the smallest failing one.

    Raises `RequestError` for an unknown op or fewer than one example, `MachineError` without Hypothesis.
    """
    op = op_named(op_name)
    if max_examples < 1:
        raise RequestError(f"max_examples is {max_examples}; it must be at least 1")
    from .strategies import search

    binding = import_of(implementation)
    name: str = named or getattr(implementation, "__qualname__", None) or repr(implementation)
    tally = _Tally(op, implementation, binding)
    try:
        search(op, tally.run, max_examples=max_examples, start=seed)
    except Exception as failure:
        smallest = tally.smallest_failing
        if smallest is None:  # nothing that the implementation did: let it be seen
            raise
        return tally.result(name, holds=False, report=_explain(tally.last_failure or failure), smallest=smallest)
    return tally.result(name, holds=True)


class _Tally:
    """Runs an implementation case by case, and keeps count."""

    def __init__(self, op: Op, implementation: Function, binding: str) -> None:
        self.op = op
        self.implementation = implementation
        self.binding = binding
        self.smallest_failing: Case | None = None
        self.last_failure: Exception | None = None
        self.cases = self.rejected = 0
        self.largest_ratio = 0.0

    def run(self, case: Case) -> None:
        self.cases += 1
        try:
            verdict = assert_matches_reference(self.op, self.implementation, case, named=self.binding)
        except Exception as failure:  # the search ends by running the smallest once more
            self.smallest_failing, self.last_failure = case, failure
            raise
        self.rejected += verdict.status is Status.REJECTED
        self.largest_ratio = max(self.largest_ratio, verdict.ratio)

    def result(self, name: str, *, holds: bool, report: str | None = None, smallest: Case | None = None) -> CheckResult:
        return CheckResult(
            op=self.op.name,
            implementation=name,
            holds=holds,
            cases=self.cases,
            rejected=self.rejected,
            largest_ratio=self.largest_ratio,
            report=report,
            smallest=None if smallest is None else repr(smallest),
            snippet=None if smallest is None else reproduction(self.op, smallest, self.binding),
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
            return f"STATISTICAL over {tested.samples} draws"
    raise TypeError(f"op {op.name} has the unknown guarantee {type(op.guarantee).__name__}")
