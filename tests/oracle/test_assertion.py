"""What the assertion says when it fails, and that its snippet fails alike."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.assertion import Mismatch, assert_matches_reference, import_of
from twinfer.oracle.case import Case, Data, RandomPicker
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import Status
from twinfer.reference.attention import attention
from twinfer.reference.quantize import dequantize_rows

OP = OPS["attention"]
CASE = Case(
    op="attention",
    sizes={"B": 2, "T": 3, "S": 4, "H": 2, "K": 1, "D": 4},
    options={"causal": True, "window": None},
    data=Data.LARGE,
    seed=3,
)


def off_in_one_place(**inputs: Tensor) -> Tensor:
    out = attention(**inputs)  # type: ignore[arg-type]
    out[1, 2, 0, 3] += 1e-3 * out[1, 2, 0].abs().max()
    return out


def test_a_right_candidate_gets_a_verdict() -> None:
    verdict = assert_matches_reference(OP, OP.variants["torch"], CASE)
    assert verdict.status is Status.PASSED
    assert 0 < verdict.ratio <= 1


def test_the_message_names_figures_place_bound_and_case() -> None:
    with pytest.raises(Mismatch) as caught:
        assert_matches_reference(OP, off_in_one_place, CASE)
    message = str(caught.value)
    for part in (
        "attention:",
        "max ",
        "mean ",
        "p99 ",
        "ulp",
        "B=1 T=2 H=0 D=3",
        "bound ",
        "(eager error)",
        "wrong      1 of 48 elements",
        repr(CASE),
    ):
        assert part in message, part
    figures = dict(part.strip().split(" ")[:2] for part in message.split("error      ")[1].split(" ulp")[:3] if part)
    assert float(figures["max"]) > 1000


def test_the_ulps_are_counted_right() -> None:
    """A result 100 ulp off, in one of four elements."""
    op = OPS["scale_temperature"]
    case = Case(op=op.name, sizes={"V": 4, "T": 1}, options={"temperature": 1.0}, data=Data.CONSTANT)

    def hundred_ulp(logits_V: Tensor, temperature: float) -> Tensor:
        out = logits_V.clone()
        out.view(torch.int32)[2] += 100
        return out

    with pytest.raises(Mismatch, match=r"max 100 ulp, mean 25 ulp"):
        assert_matches_reference(op, hundred_ulp, case)


@pytest.mark.parametrize(
    ("op", "named"),
    [
        ("attention", 'candidate = OPS["attention"].mutants["mask_off_by_one"]'),
        ("visible", 'candidate = OPS["visible"].mutants["top_left_alignment"]'),
        ("quantize_rows", 'candidate = OPS["quantize_rows"].mutants["truncated"]'),
        ("draw", 'candidate = OPS["draw"].mutants["off_by_one"]'),
    ],
)
def test_the_snippet_fails_in_the_same_way(op: str, named: str) -> None:
    """Pasted into a fresh scope, of every kind of guarantee."""
    scope: dict[str, object] = {"OPS": OPS}
    exec(named, scope)
    candidate: Any = scope["candidate"]
    drawn = (OPS[op].cases(RandomPicker(seed)) for seed in range(100))
    case = next(case for case in drawn if OPS[op].guarantee.judge(OPS[op].trial(candidate, case)).failed)
    with pytest.raises(Mismatch) as first:
        assert_matches_reference(OPS[op], candidate, case, named=named)
    with pytest.raises(Mismatch) as second:
        exec(first.value.snippet, {})
    assert str(second.value).splitlines()[:4] == str(first.value).splitlines()[:4]
    assert first.value.snippet in "\n".join(line.removeprefix("    ") for line in str(first.value).splitlines())


def test_an_importable_function_is_imported() -> None:
    """Others leave a gap to fill."""
    assert import_of(dequantize_rows) == "from twinfer.reference.quantize import dequantize_rows as candidate"
    assert import_of(lambda: None).startswith("candidate = ...")


def test_the_snippet_is_all_that_a_fresh_interpreter_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text("def stored(weight_NI, storage, dtype):\n    return weight_NI.clone()\n")
    monkeypatch.syspath_prepend(tmp_path)
    case = Case(op="stored", sizes={"N": 2, "I": 3}, options={"storage": "int8"})
    with pytest.raises(Mismatch) as caught:
        assert_matches_reference(OPS["stored"], importlib.import_module("stranger").stored, case)
    assert "from stranger import stored as candidate" in caught.value.snippet
    run = subprocess.run(
        [sys.executable, "-c", caught.value.snippet], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert run.returncode == 1
    assert str(caught.value).splitlines()[0] in run.stderr
