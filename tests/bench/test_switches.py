"""Switching one optimization off changes that one alone, and is over when the path has answered."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from twinfer.bench.candidates import PathCandidate
from twinfer.bench.switches import SWITCHES, SwitchedOff
from twinfer.compiled import attention, linear, programs
from twinfer.compiled import path as compiled_path
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage

from .tiny_llama import llama

NAMES = [switch.name for switch in SWITCHES]


def state() -> dict[str, Any]:
    """What switches may change."""
    return {
        "passes of five rows": len(linear.passes(5, Storage.INT8)),
        "oneDNN": linear.multiplies_fast(torch.ones(1)),
        "rows of products": attention._PRODUCT_ROWS,
        **programs.OPTIONS,
    }


# of Inductor's options what torch 2.13 does if nobody sets them
CHANGES: dict[str, dict[str, Any]] = {
    "CPU graphs": {},
    "four rows a pass": {"passes of five rows": 5},
    "oneDNN": {"oneDNN": False, "rows of products": 2**62},
    "attention by products": {"rows of products": 2**62},
    "multiply-add as one": {"cpp.enable_floating_point_contract_flag": "off"},
    "terms in registers": {
        "realize_opcount_threshold": None,
        "realize_reads_threshold": 4,
        "realize_acc_reads_threshold": None,
    },
    "short loops alone": {"cpp.min_chunk_size": 512},
}


@pytest.mark.parametrize("switch", SWITCHES, ids=NAMES)
def test_a_switch_changes_what_it_says_and_puts_it_back(switch: Any) -> None:
    before, wanted = state(), CHANGES[switch.name]
    assert all(before[name] != value for name, value in wanted.items())
    with switch.off():
        assert state() == {**before, **wanted}
    assert state() == before


def answers(candidate: Any) -> list[list[int]]:
    prompt_T = torch.arange(9)
    return [list(tokens) for tokens in candidate.answer(prompt_T, 4, 5)]


@pytest.mark.parametrize("switch", SWITCHES, ids=NAMES)
def test_a_path_without_one_answers_alike(switch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is made with the switch off, and the caches that others fill."""
    source, before, made = RandomSource(llama(), 3), state(), []

    def watched(*arguments: Any, **options: Any) -> CompiledPath:
        made.append((state(), inductor.force_disable_caches, options.get("captured")))
        return CompiledPath(*arguments, **options, mode="eager")

    monkeypatch.setattr(compiled_path, "CompiledPath", watched)
    right = answers(PathCandidate(CompiledPath(source, storage=Storage.INT8, mode="eager")))
    assert answers(SwitchedOff(source, Storage.INT8, switch)) == right
    assert state() == before
    with switch.off():
        off = state()
    assert made == [(off, True, False if switch.name == "CPU graphs" else None)]


def test_it_answers_with_the_switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only compiles so: five sequences are five passes."""
    seen: list[int] = []
    passes: Callable[..., list[list[int]]] = linear.passes

    def counted(rows: int, storage: Storage) -> list[list[int]]:
        seen.append(len(passes(rows, storage)))
        return passes(rows, storage)

    monkeypatch.setattr(compiled_path, "passes", counted)
    monkeypatch.setattr(compiled_path, "CompiledPath", partial(CompiledPath, mode="eager"))
    (switch,) = (each for each in SWITCHES if each.name == "four rows a pass")
    answers(SwitchedOff(RandomSource(llama(), 3), Storage.INT8, switch))
    assert set(seen) == {5}
