"""`verify` holds a right path to be right, and says what is wrong with a wrong one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from twinfer.compiled.path import CompiledPath
from twinfer.oracle import verify as room
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_encoder_config, draw_model_config, draw_moe_config
from twinfer.oracle.op import Fast
from twinfer.oracle.schedule import Extend
from twinfer.oracle.table import OPS
from twinfer.oracle.verify import verify, verify_ops
from twinfer.spec.config import Storage
from twinfer.spec.decoder import Path


def source_of(seed: int) -> RandomSource:
    return RandomSource(draw_model_config(RandomPicker(seed)), seed)


@pytest.mark.parametrize("storage", Storage)
def test_the_compiled_path_holds(storage: Storage) -> None:
    """Its graphs run eagerly here; every stage is told."""
    source, told = source_of(1), list[str]()
    candidate = CompiledPath(source, storage=storage, mode="eager")
    result = verify(source, storage=storage, candidate=candidate, schedules=2, cases=5, report=told.append)
    assert result.holds
    assert result.storage is storage
    assert len(result.drawn) == 2
    assert result.model.rows > 0
    assert 0 < result.model.largest_ratio <= 1
    assert {op.op for op in result.ops} == {op.name for op in OPS.values() if op.fast}
    assert len(told) >= 4


def test_an_encoder_holds_and_one_on_other_weights_fails() -> None:
    config = draw_encoder_config(RandomPicker(2))
    source = RandomSource(config, 2)
    candidate = CompiledPath(source, mode="eager")
    result = verify(source, candidate=candidate, schedules=3, cases=1)
    assert result.holds
    assert result.free_run is None
    assert result.model.rows == sum(len(text) for drawn in result.drawn for text in drawn[0])  # type: ignore[misc,arg-type]
    assert not verify(source, storage=Storage.INT8, candidate=candidate, schedules=3, cases=1).holds


def test_a_path_on_other_weights_fails() -> None:
    """Float32 weights where int8 ones are claimed: a difference of storage, not of rounding."""
    source = source_of(1)
    result = verify(source, storage=Storage.INT8, candidate=CompiledPath(source, mode="eager"), schedules=2, cases=1)
    assert not result.holds
    assert "times what the budget allows" in result.model.failures[0]


def test_every_op_is_tried_as_often_as_asked() -> None:
    assert {verdict.cases for verdict in verify_ops(cases=7)} == {7}


def test_a_wrong_fast_twin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * torch.relu(x)

    wrong = Fast(doubled, lambda function, inputs: function(inputs["x"]))
    broken = replace(OPS["activation"], fast={Path.COMPILED: (wrong,)})
    monkeypatch.setattr(room, "OPS", {"activation": broken})
    (verdict,) = verify_ops(cases=25)
    assert not verdict.holds
    assert (verdict.op, verdict.function) == ("activation", "doubled")
    assert "Case(op='activation'" in str(verdict.complaint)


def test_the_path_that_verify_makes_reports_its_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is given none: all choices of a model with experts are compared, and no row is left out."""
    monkeypatch.setattr(room, "CompiledPath", partial(CompiledPath, mode="eager"))
    monkeypatch.setattr(room, "OPS", {})
    result = verify(RandomSource(draw_moe_config(RandomPicker(3)), 3), schedules=2, cases=1)
    assert result.holds, result.model.failures
    tokens = sum(
        len(new) for drawn in result.drawn for step in drawn if isinstance(step, Extend) for new in step.new_tokens
    )
    assert result.model.choices == tokens * len(draw_moe_config(RandomPicker(3)).mixtures)


def test_no_model_is_judged_by_one_eager_run() -> None:
    """One is off too little by luck; of the widths of trained decoders that ship, six."""
    for hidden, runs in ((128, 6), (576, 3)):
        config = replace(draw_model_config(RandomPicker(1)), hidden=hidden)
        for compute in (torch.float32, torch.bfloat16):
            assert len(Baseline.of(RandomSource(config), compute=compute).eager) == runs
