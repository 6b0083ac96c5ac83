"""The assertion that everything else is built on, and the report it fails with."""

import importlib
import sys

from .case import Case
from .op import Function, Op
from .trial import Verdict


class Mismatch(AssertionError):
    """A candidate broke an op's guarantee; the message says how badly, where, and how to see it again."""

    def __init__(self, message: str, verdict: Verdict, snippet: str) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.snippet = snippet


def assert_matches_reference(op: Op, candidate: Function, case: Case, *, named: str | None = None) -> Verdict:
    """Raise `Mismatch` if the candidate breaks the op's guarantee on this case; otherwise return the verdict.

    A rejected case (the reference itself overflows) is no failure: look at the verdict's status to count them. `named`
    is Python that makes the candidate, for the snippet; by default, an import of it where it can be imported.
    """
    verdict = op.guarantee.judge(op.trial(candidate, case))
    if verdict.failed:
        snippet = reproduction(op, case, named or import_of(candidate))
        raise Mismatch(report(op, case, verdict, snippet), verdict, snippet)
    return verdict


def report(op: Op, case: Case, verdict: Verdict, snippet: str) -> str:
    lines = [f"{op.name}: {verdict.complaint}", *(f"  {line}" for line in verdict.details), f"  case       {case!r}"]
    return "\n".join([*lines, "To see it again:", "", *(f"    {line}" for line in snippet.splitlines())])


def reproduction(op: Op, case: Case, candidate: str) -> str:
    """Python that fails in the same way when pasted."""
    return "\n".join(
        [
            "import torch",
            "from twinfer.oracle.assertion import assert_matches_reference",
            "from twinfer.oracle.case import Case, Data",
            "from twinfer.oracle.table import OPS",
            candidate,
            f"case = {case!r}",
            f"assert_matches_reference(OPS[{op.name!r}], candidate, case)",
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
