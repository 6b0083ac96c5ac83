"""The tables that `python -m twinfer.oracle.calibration` prints, and its exit status."""

from dataclasses import replace

import pytest

from twinfer.oracle import calibration as evidence
from twinfer.oracle.op import Op
from twinfer.oracle.table import OPS

SMALL: dict[str, Op] = {name: OPS[name] for name in ("visible", "keep_top_k", "scale_temperature")}


def test_both_tables_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evidence, "OPS", SMALL)
    assert evidence.main(pairs=20, cases=40) == 0
    out = capsys.readouterr().out
    for name, op in SMALL.items():
        assert sum(line.startswith(name) for line in out.splitlines()) == 1 + len(op.mutants)


def test_a_fault_taken_for_right_is_a_false_alarm_and_one_that_changes_nothing_is_missed() -> None:
    """With the roles swapped, both counts say so."""
    op = SMALL["keep_top_k"]
    swapped = replace(op, variants=op.mutants, mutants=op.variants)
    assert evidence.false_alarms(swapped, 40).alarms
    assert evidence.fault_caught(swapped, "by_hand", 40).caught == 0
