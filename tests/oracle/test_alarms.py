"""False alarms are counted over runs: a later run adds to an earlier one and draws other cases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from twinfer.oracle import alarms
from twinfer.oracle.table import OPS


def test_a_later_run_goes_on_where_the_last_stopped(tmp_path: Path) -> None:
    """Two rounds, written and read between, see as many different cases as two rounds at once."""
    seen: list[str] = []

    def reference(**given: Any) -> Any:
        seen.append(str(given["x"].tolist()))
        return OPS["activation"].reference(**given)

    op = replace(OPS["activation"], variants={"itself": reference})
    first = alarms.one_more_round(op, alarms.Count())
    alarms.write(tmp_path / "counts.json", {"activation": first})
    second = alarms.one_more_round(op, alarms.read(tmp_path / "counts.json")["activation"])
    assert (second.cases, second.pairs) == (2 * alarms.ROUND, 2 * alarms.ROUND)
    assert len(set(seen)) > 1.5 * alarms.ROUND


def test_an_alarm_is_kept_and_decides_the_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a fault that is taken for right, in whichever run it was."""
    op = OPS["activation"]
    wrong = replace(op, variants={"negatives_leak": op.mutants["negatives_leak"]})
    monkeypatch.setattr(alarms, "OPS", {"activation": wrong})
    file = tmp_path / "counts.json"
    alarms.write(file, {"activation": alarms.one_more_round(wrong, alarms.Count())})
    assert alarms.main(file, minutes=0) == 1
    assert "negatives_leak on Case(" in capsys.readouterr().out
