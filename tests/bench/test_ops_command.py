"""`twinfer bench ops`, end to end on tiny sizes."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.bench import compiling, limits, ops
from twinfer.bench.limits import Probe, Probes, share_of_limit
from twinfer.bench.rows import Accuracy, Row, read_rows, write_rows
from twinfer.commands import bench_ops
from twinfer.commands.main import main

TINY = ["bench", "ops", "--op", "activation", "--shape", "T=2,F=8", "--rounds", "3"]
FUNCTIONS = """
import itertools
import torch
from types import FunctionType

def right(*, x, kind):
    return x * torch.sigmoid(x)

def wrong(*, x, kind):
    return x * torch.sigmoid(x) * 1.01

def raising(*, x, kind):
    raise ZeroDivisionError("not today")

number = itertools.count()

def recompiling(*, x, kind):
    code = right.__code__.replace(co_name=f"right_{next(number)}")
    fresh = FunctionType(code, globals(), code.co_name, None, None)
    fresh.__kwdefaults__ = {}
    return torch.compile(fresh, backend="eager")(x=x, kind=kind)
"""


@pytest.fixture(autouse=True)
def prepared_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes are found in tests of their own; these are quick to call."""
    values = torch.ones(1000)
    read = Probe(name="sum", call=lambda: values.sum(), amount=values.nbytes, rate=1.0)
    gemm = Probe(name="dot", call=lambda: values @ values, amount=2000, rate=1.0)
    monkeypatch.setattr(limits, "find_probes", lambda *_, **__: Probes(read=read, gemm=gemm))
    monkeypatch.setattr(compiling, "start_compiler", lambda device: None)


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A stranger's module in the current folder."""
    (tmp_path / "strangers_bench.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "strangers_bench"
    sys.modules.pop("strangers_bench", None)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit status, and what --json prints."""
    status = main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Rows, file, charts; and the command that a row names measures that row again."""
    out = tmp_path / "rows.jsonl"
    status, printed = run(
        capsys, *TINY, "--column", "compiled", "--out", str(out), "--charts", str(tmp_path), "--seed", "7"
    )
    assert status == 0
    rows = read_rows(out)
    assert [row.implementation for row in rows] == ["eager", "compiled"]
    assert [json.loads(row.to_json()) for row in rows] == printed["rows"]
    eager, compiled = rows
    assert eager.speed_up == 1
    for row in rows:
        assert row.accuracy is Accuracy.PASSED
        assert row.error_over_bound is not None
        assert row.error_over_bound <= 1
        assert row.p20_s is not None
        assert row.p50_s is not None
        assert row.p80_s is not None
        assert 0 < row.p20_s <= row.p50_s <= row.p80_s
        assert row.repeats == 3
        assert row.bytes == 4 * 2 * 16
        assert row.gb_per_s == row.bytes / row.p50_s / 1e9
        assert row.limits is not None
        assert row.limits == eager.limits
        assert row.limits.read_bytes_per_s > 1e6
        assert row.share_of_limit == share_of_limit(row.bytes, row.flops or 0, row.p50_s, row.limits)
        assert row.seed == 7
        assert row.machine.torch == torch.__version__
    assert (compiled.graphs, compiled.graph_breaks, compiled.recompiles) == (1, (), 0)
    assert compiled.compile_cold_s is not None
    assert compiled.compile_warm_s is not None
    assert compiled.compile_cold_s > compiled.compile_warm_s > 0
    assert eager.graphs is None
    assert printed["geometric_means"] == {"compiled": pytest.approx(compiled.speed_up, rel=1e-12)}
    assert {"roofline.png", "speed-ups.png"} <= {path.name for path in tmp_path.iterdir()}

    program, *words = shlex.split(compiled.repro)
    assert program == "twinfer"
    status, again = run(capsys, *words)
    assert status == 0
    repeated = [replace(row, machine=row.machine) for row in rows]
    assert [(r["implementation"], r["shape"], r["seed"], r["repro"]) for r in again["rows"]] == [
        (row.implementation, dict(row.shape), row.seed, row.repro) for row in repeated
    ]


def test_anyones_function_is_a_column(
    capsys: pytest.CaptureFixture[str], functions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, printed = run(capsys, *TINY, "--impl", f"{functions}:right", "--column", f"{functions}:right")
    assert status == 0
    assert [row["implementation"] for row in printed["rows"]] == ["eager", "strangers_bench:right"]
    own = printed["rows"][1]
    assert own["accuracy"] == "passed"
    assert own["speed_up"] > 0
    assert f"--impl {functions}:right --column {functions}:right" in own["repro"]


def test_a_wrong_function_is_found_out(capsys: pytest.CaptureFixture[str], functions: str) -> None:
    status, printed = run(capsys, *TINY, "--impl", f"{functions}:wrong", "--column", f"{functions}:wrong")
    assert status == 1
    assert [row["accuracy"] for row in printed["rows"]] == ["passed", "failed"]
    assert printed["rows"][1]["error_over_bound"] > 1


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("recompiling", "strangers_bench:recompiling recompiled while it was timed"), ("raising", "not today")],
)
def test_one_that_fails_has_no_times(
    capsys: pytest.CaptureFixture[str], functions: str, name: str, complaint: str
) -> None:
    """And the others are timed all the same."""
    status = main([*TINY, "--impl", f"{functions}:{name}", "--impl", f"{functions}:right", *_columns(functions, name)])
    shown = " ".join(capsys.readouterr().out.split())
    assert status == 1
    assert complaint in shown
    status, printed = run(
        capsys, *TINY, "--impl", f"{functions}:{name}", "--impl", f"{functions}:right", *_columns(functions, name)
    )
    rows = {row["implementation"]: row for row in printed["rows"]}
    assert complaint in rows[f"{functions}:{name}"]["error"]
    assert rows[f"{functions}:{name}"]["p50_s"] is None
    assert rows[f"{functions}:right"]["speed_up"] > 0


def _columns(functions: str, name: str) -> list[str]:
    return ["--column", f"{functions}:{name}", "--column", f"{functions}:right"]


def test_reduce_overhead_says_that_it_captures_nothing_here(capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = run(capsys, *TINY, "--column", "reduce-overhead")
    row = printed["rows"][1]
    assert row["implementation"] == "reduce-overhead"
    assert "no CUDA graphs on a CPU" in row["note"]
    assert row["p50_s"] is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--op", "softmax"], "the ops that are timed are linear, linear_w8a8, mlp"),
        (["--op", "linear", "--shape", "T=1,N=4"], "linear has B T I N"),
        (["--op", "linear", "--shape", "T=1,N"], "no shape"),
        (["--op", "linear", "--shape", "T=0,I=1,N=1"], "below 1"),
        (["--shape", "T=1"], "--op names 0"),
        (["--op", "linear", "--column", "fastest"], "the columns are eager, torch.compile"),
        (["--impl", "a:b"], "--impl is a function of one op"),
        (["--op", "rotate", "--storage", "int8"], "nothing is left to time"),
        (["--op", "rotate", "--rounds", "0"], "--rounds is 0"),
        (["--op", "rotate", "--compare", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--op", "rotate", "--out", "nowhere/rows.jsonl"], "nowhere"),
        (["--op", "rotate", "--charts", "nowhere"], "nowhere"),
    ],
)
def test_bad_requests_are_named_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    monkeypatch.setattr(bench_ops, "measure", _forbidden)
    assert main(["bench", "ops", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_missing_matplotlib_is_said_before_anything_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_ops, "measure", _forbidden)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "--charts", str(tmp_path)]) == 2
    assert "twinfer[bench]" in capsys.readouterr().err


def _forbidden(*_: object) -> list[Row]:
    raise AssertionError("something was timed")


class Measured:
    """In place of `measure`: rows of given speed-ups, one list a call."""

    def __init__(self, *runs: list[Row]) -> None:
        self.runs = list(runs)
        self.asked: list[tuple[list[str], Any]] = []

    def __call__(self, selection: Any, about: Any, out: Path | None = None) -> list[Row]:
        self.asked.append(([setting.op.name for setting, _, _ in selection], about.columns))
        return self.runs.pop(0)


@pytest.mark.parametrize(
    ("second", "status"), [((1.8, 2.0, 2.1), 1), ((2.8, 3.0, 3.1), 0)], ids=["slower twice", "slower once"]
)
def test_a_regression_fails_and_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_row: Callable[..., Row],
    second: tuple[float, float, float],
    status: int,
) -> None:
    """If it is there the second time too; only what looked slower is measured again, and the rest stays."""
    old = tmp_path / "old.jsonl"
    mlp = {"name": "mlp", "shape": {"B": 1, "T": 1, "M": 4, "F": 8}}
    write_rows(old, [make_row((2.8, 3.0, 3.1)), make_row((2.8, 3.0, 3.1), **mlp)])
    measured = Measured([make_row((1.0, 1.1, 1.2)), make_row((2.8, 3.0, 3.1), **mlp)], [make_row(second)])
    monkeypatch.setattr(bench_ops, "measure", measured)
    assert main(["bench", "ops", "--compare", str(old)]) == status
    assert measured.asked == [(["linear", "mlp"], None), (["linear"], frozenset({"compiled"}))]
    shown = capsys.readouterr().out
    assert ("linear B=1,T=1,I=576,N=960 int8 compiled: slower" in shown) == (status == 1)
    assert f"{status} regressions; {2 - status} of 2 rows the same within noise" in shown


def test_an_interrupted_run_leaves_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_row: Callable[..., Row]
) -> None:
    results: list[Any] = [[make_row()], [make_row(name="mlp")]]

    def one(*_: object) -> Any:
        if not results:
            raise KeyboardInterrupt
        return results.pop(0)

    monkeypatch.setattr(ops, "measure_op", one)
    out = tmp_path / "rows.jsonl"
    assert main(["bench", "ops", "--quick", "--out", str(out)]) == 130
    assert [row.name for row in read_rows(out)] == ["linear", "mlp"]


def test_a_file_of_another_schema_is_refused(
    capsys: pytest.CaptureFixture[str], make_row: Callable[..., Row], tmp_path: Path
) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text(make_row().to_json().replace("twinfer.bench/2", "twinfer.bench/9"))
    assert main(["bench", "ops", "--compare", str(old)]) == 2
    assert "schema is 'twinfer.bench/9'" in capsys.readouterr().err
