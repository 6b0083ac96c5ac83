"""Switching one optimization off changes that one only, and no answer."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.bench import switches
from twinfer.bench.candidates import PathCandidate
from twinfer.bench.switches import SWITCHES, Switch, switched_off
from twinfer.compiled import programs
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage

from .tiny_llama import llama

NAMES = [switch.name for switch in SWITCHES]
# what torch 2.13 does if nobody sets these
KERNELS: dict[str, dict[str, Any]] = {
    "CPU graphs": {},
    "multiply-add as one": {"cpp.enable_floating_point_contract_flag": "off"},
    "terms in registers": {
        "realize_opcount_threshold": None,
        "realize_reads_threshold": 4,
        "realize_acc_reads_threshold": None,
    },
    "short loops on one thread": {"cpp.min_chunk_size": 512},
}


@pytest.mark.parametrize("switch", SWITCHES, ids=NAMES)
def test_a_piece_is_compiled_with_the_options_of_the_switch_only(
    switch: Switch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are as without a switch; and no program is kept under the key of one that was compiled otherwise."""
    given: list[dict[str, Any]] = []

    def compiled(function: Any, *, options: dict[str, Any], **_: object) -> Any:
        given.append({name: value for name, value in options.items() if name != "guard_filter_fn"})
        return function

    def kept(*_: object) -> Any:
        pytest.fail("a program with a switch off was looked for among those that are kept")

    monkeypatch.setattr(programs, "_compile", compiled)
    programs.graph(_twice)
    if switch.options.get("kernels"):
        monkeypatch.setattr(programs, "load_or_compile", kept)
    pieces = programs.Pieces("", lambda why: None, kernels=switch.options.get("kernels", {}))
    if not switch.options.get("kernels"):
        monkeypatch.setattr(programs, "load_or_compile", lambda program, *_: program)
    assert torch.equal(pieces(_twice, {})(torch.ones(3)), torch.full((3,), 2.0))
    usual, switched = given
    changed = {name: value for name, value in switched.items() if usual[name] != value}
    assert changed == KERNELS[switch.name]
    assert usual.keys() == switched.keys()


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def answers(candidate: Any) -> list[list[int]]:
    return [list(tokens) for tokens in candidate.answer(torch.arange(9), 4, 5)]


@pytest.mark.parametrize("switch", SWITCHES, ids=NAMES)
def test_a_path_without_one_answers_alike(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    source, made = RandomSource(llama(), 3), []

    def noted(*arguments: Any, **options: Any) -> CompiledPath:
        made.append(options)
        return CompiledPath(*arguments, **options, mode="eager")

    monkeypatch.setattr(switches, "CompiledPath", noted)
    right = answers(PathCandidate(partial(CompiledPath, mode="eager")(source, storage=Storage.INT8)))
    assert answers(switched_off(source, Storage.INT8, switch)) == right
    assert made == [{"storage": Storage.INT8, **switch.options}]
