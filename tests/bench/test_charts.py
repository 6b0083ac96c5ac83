"""The charts show the rows they are given, and are images."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twinfer.bench.charts import ROOFLINE, SPEED_UPS, check_charts, roofline, speed_up_bars, write_charts
from twinfer.bench.rows import Row
from twinfer.spec.errors import MachineError, RequestError

MakeRow = Callable[..., Row]


@pytest.fixture
def rows(make_row: MakeRow) -> list[Row]:
    even = {"speed_up": 1.0, "implementation": "eager"}
    return [
        make_row(**even),
        make_row(),
        make_row(shape={"T": 8}, speed_up=12.0),
        make_row(storage="float32", **even),
        make_row(storage="float32", speed_up=0.5),
        make_row(storage="float32", implementation="torch.compile", speed_up=2.0),
        make_row(implementation="reduce-overhead", speed_up=None, gflop_per_s=None),
    ]


def test_bars_are_geometric_means(rows: list[Row]) -> None:
    """One for each op, storage and implementation that was timed and is not the baseline."""
    axes = speed_up_bars(rows).axes[0]
    heights = {}
    for bars in axes.containers:
        for bar in bars:
            place = round(bar.get_x() + bar.get_width() / 2)
            heights[bars.get_label(), axes.get_xticklabels()[place].get_text()] = bar.get_height()
    assert heights == {
        ("compiled", "linear\nint8"): pytest.approx(6.0, rel=1e-12),
        ("compiled", "linear\nfloat32"): 0.5,
        ("torch.compile", "linear\nfloat32"): 2.0,
    }


def test_points_lie_under_the_machines_limit(rows: list[Row]) -> None:
    """At the row's operations a byte and its rate; the limit bends where reading takes as long as multiplying."""
    axes = roofline(rows).axes[0]
    points = {tuple(point) for drawn in axes.collections for point in drawn.get_offsets().tolist()}
    assert points == {(2.0, 12.0)}
    assert {drawn.get_label() for drawn in axes.collections} == {"eager", "compiled", "torch.compile"}
    (line,) = axes.lines
    across, up = line.get_xdata(), line.get_ydata()
    assert list(zip(across, up, strict=True)) == [(2.0, 80.0), (5.0, 200.0), (10.0, 200.0)]


def test_charts_are_png_files_that_depend_on_the_rows(rows: list[Row], tmp_path: Path) -> None:
    assert write_charts(rows, tmp_path) == [tmp_path / ROOFLINE, tmp_path / SPEED_UPS]
    for name in (ROOFLINE, SPEED_UPS):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", data[16:24]) == (1200, 720)
    before = [(tmp_path / name).read_bytes() for name in (ROOFLINE, SPEED_UPS)]
    write_charts(rows, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in (ROOFLINE, SPEED_UPS)] == before
    write_charts(rows[:2], tmp_path)
    assert all((tmp_path / name).read_bytes() != old for name, old in zip((ROOFLINE, SPEED_UPS), before, strict=True))


def test_what_would_stop_the_charts_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_charts(tmp_path)
    with pytest.raises(RequestError, match="nowhere"):
        check_charts(tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MachineError, match=r"twinfer\[bench\]"):
        check_charts(tmp_path)
