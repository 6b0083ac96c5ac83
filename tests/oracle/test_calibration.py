"""The tables that `python -m twinfer.oracle.calibration` prints, and its exit status."""

from dataclasses import replace

import pytest
import torch

from twinfer.oracle import calibration as evidence
from twinfer.oracle.guarantees import Statistical
from twinfer.oracle.mutations import Family, mutants
from twinfer.oracle.op import Op
from twinfer.oracle.resolution import PLACES, off_by, resolution
from twinfer.oracle.table import OPS

SMALL: dict[str, Op] = {name: OPS[name] for name in ("visible", "keep_top_k", "scale_temperature")}


def test_both_tables_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evidence, "OPS", SMALL)
    assert evidence.main(pairs=20, cases=400) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(sum(line.startswith(name) for line in lines) == 1 for name in SMALL)
    assert all(sum(line.startswith(family) for line in lines) == 1 for family in ("logic", "size", "state", "contract"))


def test_a_fault_taken_for_right_is_a_false_alarm_and_one_that_changes_nothing_is_missed() -> None:
    """With the roles swapped, both counts say so."""
    op = SMALL["keep_top_k"]
    swapped = replace(op, variants=op.mutants, mutants=op.variants)
    assert evidence.false_alarms(swapped, 40).alarms
    families, missed = evidence.caught_by_family([swapped], 40)
    assert families[Family.LOGIC] == (0, 1)
    assert "keep_top_k: by_hand (logic)" in missed


def test_every_family_reaches_every_op_that_it_concerns() -> None:
    """At least 300 faults over all ops, and of each op some in size, state and contract."""
    found = [mutant for op in OPS.values() for mutant in mutants(op)]
    assert len(found) >= 300
    assert {mutant.family for mutant in found} == set(Family)
    for name, op in OPS.items():
        families = {mutant.family for mutant in found if mutant.op == name}
        if not isinstance(op.guarantee, Statistical):
            assert {Family.LOGIC, Family.SIZE, Family.STATE, Family.CONTRACT} <= families, name


@pytest.mark.parametrize("place", PLACES)
def test_what_is_off_is_off_in_the_named_place(place: str) -> None:
    """Of 20 numbers all, the eleventh, or the two smallest."""
    wrong = off_by(lambda x: x.clone(), 0.5, place)
    x = torch.arange(1.0, 21.0)
    off = (wrong(x=x) != x).nonzero()[:, 0].tolist()
    assert off == {"all": list(range(20)), "one": [10], "tenth": [0, 1]}[place]


def test_a_budget_sees_a_large_error_and_not_a_tiny_one() -> None:
    """Of float32, 0.01 % in nearly all cases; of bfloat16, 20 % in nearly all and 0.01 % in none."""
    for dtype, least, sees in (
        (torch.float32, 0.0001, True),
        (torch.bfloat16, 0.0001, False),
        (torch.bfloat16, 0.2, True),
    ):
        found = resolution(OPS["linear"], dtype, 10)
        assert found is not None
        assert (found.alarms["all", least] >= 90) == sees
