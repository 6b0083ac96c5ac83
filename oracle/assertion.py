"""The assertion that everything else is built on, and the report it fails with."""

import importlib
import sys
from dataclasses import replace

from .budget import Budget
from .case import Case
from .op import Function, Op
from .trial import Arithmetic, Verdict, failure


class Mismatch(AssertionError):
    """A candidate broke an op's guarantee; the message says how badly, where, and how to see it again."""

    def __init__(self, message: str, verdict: Verdict, snippet: str) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.snippet = snippet


def assert_matches_reference(
    op: Op, candidate: Function, case: Case, *, named: str | None = None, arithmetic: Arithmetic = Arithmetic.WIDE
) -> Verdict:
    """Raise `Mismatch` if the candidate breaks the op's guarantee on this case; otherwise return the verdict.

    A rejected case (the reference itself overflows) is no failure: look at the verdict's status to count them. `named`
    is Python that makes the candidate, for the snippet; by default, an import of it where it can be imported.
    """
    verdict = op.guarantee.judge(op.trial(candidate, case, arithmetic))
    if verdict.failed:
        snippet = reproduction(op, case, named or import_of(candidate), arithmetic)
        verdict = replace(verdict, details=(*verdict.details, *_conventions_that_hold(op, candidate, case, arithmetic)))
        raise Mismatch(report(op, case, verdict, snippet), verdict, snippet)
    return verdict


def assert_obeys(op: Op, candidate: Function, case: Case, *, named: str | None = None) -> None:
    """Raise `Mismatch` if the candidate breaks one of the op's properties on this case."""
    for law in op.properties:
        try:
            law(op, candidate, case)
        except AssertionError as broken:
            snippet = reproduction(op, case, named or import_of(candidate), asserting="assert_obeys")
            stated = " ".join((law.__doc__ or law.__name__).split())
            verdict = failure(f"breaks a property: {stated}", *str(broken).splitlines()[:1])
            raise Mismatch(report(op, case, verdict, snippet), verdict, snippet) from broken


def _conventions_that_hold(op: Op, candidate: Function, case: Case, arithmetic: Arithmetic) -> list[str]:
    """Name each option under which the candidate would have passed."""
    held = []
    for option in op.conventions:
        if option not in op.chosen:
            other = op.under(option)
            try:
                fails = other.guarantee.judge(other.trial(candidate, case, arithmetic)).failed
            except Exception:  # of a candidate that does not take what this option hands it
                continue
            if not fails:
                held.append(f"convention this case holds with --option {option}")
    sums_in_16_bits = arithmetic is Arithmetic.WIDE and isinstance(op.guarantee, Budget) and case.dtype.itemsize == 2
    if sums_in_16_bits and not op.guarantee.judge(op.trial(candidate, case, Arithmetic.NARROW)).failed:
        held.append(f"arithmetic this case holds with --arithmetic narrow, for what sums in {case.dtype}")
    return held


def report(op: Op, case: Case, verdict: Verdict, snippet: str) -> str:
    lines = [f"{op.name}: {verdict.complaint}", *(f"  {line}" for line in verdict.details), f"  case       {case!r}"]
    return "\n".join([*lines, "To see it again:", "", *(f"    {line}" for line in snippet.splitlines())])


def reproduction(
    op: Op,
    case: Case,
    candidate: str,
    arithmetic: Arithmetic = Arithmetic.WIDE,
    *,
    asserting: str = "assert_matches_reference",
) -> str:
    """Python that fails in the same way when pasted."""
    under = f".under({', '.join(map(repr, op.chosen))})" if op.chosen else ""
    narrow = arithmetic is Arithmetic.NARROW
    words = ", arithmetic=Arithmetic.NARROW" if narrow else ""
    return "\n".join(
        [
            "import torch",
            f"from twinfer.oracle.assertion import {asserting}",
            "from twinfer.oracle.case import Case, Data",
            "from twinfer.oracle.table import OPS",
            *(["from twinfer.oracle.trial import Arithmetic"] if narrow else []),
            candidate,
            f"case = {case!r}",
            f"{asserting}(OPS[{op.name!r}]{under}, candidate, case{words})",
        ]
    )


def import_of(function: Function) -> str:
    """A line that binds `candidate` to the function: an import, or a gap to fill for what no import reaches."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module and name and module != "__main__" and "." not in name:
        found = getattr(sys.modules.get(module) or importlib.import_module(module), name, None)
        if found is function:
            return f"from {module} import {name} as candidate"
    return f"candidate = ...  # your function: {name or function!r}"
