"""The table of ops: complete, every right implementation passes, every seeded fault is caught, laws hold."""

import inspect
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib import import_module
from itertools import count, islice
from typing import Any

import pytest
import torch
from torch import Tensor

import twinfer.reference
from twinfer.compiled import packing
from twinfer.oracle.calibration import false_alarms
from twinfer.oracle.case import Case, RandomPicker
from twinfer.oracle.guarantees import Statistical
from twinfer.oracle.mutations import Family, Mutant, caught_after
from twinfer.oracle.op import Fast, Function, Op, Property
from twinfer.oracle.search import drawn
from twinfer.oracle.table import OPS, WITHOUT_RECORD
from twinfer.oracle.trial import leaves, map_leaves

EXHAUSTIVE = os.environ.get("HYPOTHESIS_PROFILE") == "exhaustive"
PAIRS = 10_000 if EXHAUSTIVE else 120
"""Of each op: a right implementation and a case."""
FAULT_CASES = 200
"""A fault must be caught within as many; `twinfer check` draws five times as many by default."""

ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
faults = pytest.mark.parametrize(
    ("op", "fault"), [pytest.param(op, name, id=f"{op.name}-{name}") for op in OPS.values() for name in op.mutants]
)

AT_LOADING = packing.pack, packing.quantize_rows, packing.quantize_groups
"""Run once, and never in a graph."""

twins = pytest.mark.parametrize(
    ("op", "twin"),
    [
        pytest.param(op, twin, id=f"{op.name}-{path}-{twin.name}")
        for op in OPS.values()
        for path, fast in op.fast.items()
        for twin in fast
    ],
)


def cases_for(op: Op, twin: Fast) -> Iterator[Case]:
    drawn = (op.draw(RandomPicker(seed)) for seed in range(5000))
    return (case for case in drawn if twin.applies(op.inputs(case)))


def breaks(law: Property, op: Op, implementation: Function, case: Case) -> bool:
    try:
        law(op, implementation, case)
    except Exception:
        return True
    return False


def moody(function: Function) -> Function:
    """Different at every call, and in every row for the others' sake."""
    calls = count()

    def call(**inputs: Any) -> Any:
        noise = sum(float(leaf.double().nan_to_num().sum()) for leaf in leaves(inputs) if leaf.numel())
        change = next(calls) + noise

        def add(leaf: Any) -> Any:
            return leaf + int(change) % 7 if isinstance(leaf, Tensor | int) else leaf

        return map_leaves(add, function(**inputs))

    return call


def test_every_public_function_of_the_reference_has_a_record_or_a_reason() -> None:
    """And nothing is listed that does not exist."""
    public = {}
    for module in pkgutil.walk_packages(twinfer.reference.__path__, "twinfer.reference."):
        for name, function in vars(import_module(module.name)).items():
            if inspect.isfunction(function) and function.__module__ == module.name and not name.startswith("_"):
                public[f"{module.name}.{name}"] = function
    recorded = {getattr(op.reference, "func", op.reference) for op in OPS.values()}
    missing = {name for name, function in public.items() if function not in recorded} - WITHOUT_RECORD.keys()
    assert not missing, f"give these a record in oracle/, or a reason in WITHOUT_RECORD: {sorted(missing)}"
    assert WITHOUT_RECORD.keys() <= public.keys()
    assert not {name for name in WITHOUT_RECORD if public[name] in recorded}
    assert all(WITHOUT_RECORD.values())


@ops
def test_no_record_lacks_a_field(op: Op) -> None:
    empty = {field.name for field in fields(op) if not getattr(op, field.name)} - {
        "fast",
        "no_fast",
        "conventions",
        "chosen",
    }
    assert not empty
    assert len(op.mutants) >= 3, "seed at least three faults"
    assert op.name == op.cases(RandomPicker(0)).op
    assert set(op.axes.split()) <= set(op.cases(RandomPicker(0)).sizes)
    sizes = op.cases(RandomPicker(0)).n
    assert op.flops(sizes) >= 0
    assert op.bytes(sizes) > 0
    for law in op.properties:
        assert law.__doc__, "a law states itself in its docstring"


@ops
def test_flops_and_bytes_grow_with_every_axis(op: Op) -> None:
    """Doubling a size never makes an op cheaper."""
    for seed in range(10):
        case = op.draw(RandomPicker(seed))
        for axis in case.sizes:
            larger = type(case.n)(**{**case.sizes, axis: 2 * case.sizes[axis]})
            assert op.flops(larger) >= op.flops(case.n)
            assert op.bytes(larger) >= op.bytes(case.n)


@ops
def test_no_false_alarm(op: Op) -> None:
    """Every right implementation passes on every drawn case; what is rejected is rare."""
    row = false_alarms(op, PAIRS)
    assert not row.alarms, row.alarms[0]
    assert row.rejected <= 0.02 * row.pairs + 1


@faults
def test_no_fault_is_missed(op: Op, fault: str) -> None:
    """The first case that catches it is enough; `twinfer.oracle.calibration` counts them all."""
    statistical = isinstance(op.guarantee, Statistical)  # a lean shows in all draws of a check together
    mutant = Mutant(op.name, fault, Family.LOGIC, lambda: op.mutants[fault])
    cases = 1000 if statistical else FAULT_CASES
    assert caught_after(mutant, op, cases, lambda number: drawn(op, 0, number)[0]) is not None


@ops
def test_the_reference_obeys_the_laws(op: Op) -> None:
    for seed in range(25):
        case = op.draw(RandomPicker(seed))
        for law in op.properties:
            law(op, op.reference, case)


@twins
def test_fast_twins_keep_the_guarantee(op: Op, twin: Fast) -> None:
    """Every fast callable, run as written, on drawn cases of the kind that its path meets."""
    for case in islice(cases_for(op, twin), 60):
        verdict = op.guarantee.judge(op.trial(twin, case))
        assert not verdict.failed, f"{verdict.complaint} {verdict.details} on {case}"


@twins
def test_fast_twins_obey_the_laws(op: Op, twin: Fast) -> None:
    for case in islice(cases_for(op, twin), 20):
        for law in op.properties:
            law(op, twin, case)


@pytest.mark.parametrize(
    ("op", "twin"),
    [
        pytest.param(op, twin, id=f"{op.name}-{twin.name}")
        for op in (OPS.values() if EXHAUSTIVE else [OPS["rms_norm"]])
        for fast in op.fast.values()
        for twin in fast
        if twin.function
        not in (
            packing.pack,
            packing.quantize_rows,
            packing.quantize_groups,
        )  # run once, at loading, and never in a graph
    ],
)
def test_fast_twins_keep_the_guarantee_compiled(op: Op, twin: Fast) -> None:
    """Compiled alone, by Inductor. Whole graphs are compiled in the tests of the path; here the profile decides."""
    compiled = replace(twin, function=torch.compile(twin.function, dynamic=True))
    for case in islice(cases_for(op, twin), 12 if EXHAUSTIVE else 4):
        verdict = op.guarantee.judge(op.trial(compiled, case))
        assert not verdict.failed, f"{verdict.complaint} {verdict.details} on {case}"


@ops
def test_laws_are_broken_by_some_fault(op: Op) -> None:
    """A law that no implementation could break says nothing."""
    impostors = [moody(op.reference), *op.mutants.values()]
    for law in op.properties:
        assert any(breaks(law, op, wrong, op.draw(RandomPicker(seed))) for wrong in impostors for seed in range(25)), (
            f"no fault of {op.name} breaks {law.__name__}"
        )
