"""False alarms are counted over runs: a later run adds to an earlier one and draws other cases."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.oracle import alarms, model_alarms
from twinfer.oracle.table import OPS
from twinfer.reference.components import DEFAULT
from twinfer.reference.path import ReferencePath
from twinfer.spec.errors import RequestError


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


def test_whole_models_are_counted_beside_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: a later run draws the next model, every prompt on every right path is a pair, and choices are judged."""
    monkeypatch.setattr(model_alarms, "BATCHES", 1)
    file = tmp_path / "counts.json"
    seeds: list[int] = []
    judge_model = alarms.judge_model
    monkeypatch.setattr(alarms, "judge_model", lambda seed, *how: (seeds.append(seed), judge_model(seed, *how))[1])
    for _ in range(2):
        given = {"models_float32": alarms.rounds()["models_float32"]}
        alarms.write(file, next(alarms.counted(given, alarms.read(file), lambda: True)))
    count = alarms.read(file)["models_float32"]
    assert (count.cases, count.alarms) == (2, ())
    assert seeds[1] == seeds[0] + 1
    assert 6 <= count.pairs <= 18, "two models, three paths, one to three prompts"
    assert count.rows + count.left_out >= count.pairs
    assert count.choices > 0


def test_a_wrong_path_of_a_whole_model_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the seed, the path, the storage and the compute dtype; the others of the model raise none."""

    def linear(*given: Any) -> Any:
        return 1.01 * DEFAULT.linear(*given)

    right_paths = model_alarms.right_paths

    def with_a_wrong_one(source: Any, storage: Any, compute: Any) -> Any:
        wrong = ReferencePath(source, storage=storage, components=replace(DEFAULT, linear=linear))
        return {"right": right_paths(source, storage, compute)["compiled"], "wrong": wrong}

    monkeypatch.setattr(model_alarms, "right_paths", with_a_wrong_one)
    alarmed = model_alarms.judge_model(2, torch.float32).alarms
    assert alarmed
    assert all(alarm.startswith("seed 2, wrong, ") and "torch.float32" in alarm for alarm in alarmed)


def test_a_name_that_is_not_counted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'layers' is not counted; what is: linear, .*models_float32"):
        alarms.main(tmp_path / "counts.json", 0, ["layers"])
    assert not list(tmp_path.iterdir())
