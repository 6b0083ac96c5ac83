"""Rows as lines of JSON: nothing is lost, nothing invented, nothing half written."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinfer.bench.rows import (
    SCHEMA,
    Accuracy,
    Kind,
    Limits,
    Machine,
    Row,
    from_json,
    highest_limits,
    read_rows,
    write_rows,
    written,
)
from twinfer.spec.errors import RequestError

_text = st.text(max_size=8)
_float = st.floats(allow_nan=False, allow_infinity=False)
_count = st.integers(0, 2**60)


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


_rows = st.builds(
    Row,
    kind=st.sampled_from(Kind),
    name=_text,
    shape=st.dictionaries(_text, _count, max_size=3),
    storage=_text,
    implementation=_text,
    rows=_maybe(_count),
    error=_maybe(_text),
    note=_maybe(_text),
    p20_s=_maybe(_float),
    p50_s=_maybe(_float),
    p80_s=_maybe(_float),
    speed_up=_maybe(_float),
    share_of_limit=_maybe(_float),
    compile_cold_s=_maybe(_float),
    graph_breaks=_maybe(st.lists(_text, max_size=2).map(tuple)),
    peak_memory_bytes=_maybe(_count),
    accuracy=st.sampled_from(Accuracy),
    error_over_bound=_maybe(_float),
    limits=_maybe(st.builds(Limits, read_bytes_per_s=_float, read_by=_text, gemm_flops_per_s=_float, gemm_by=_text)),
    machine=st.builds(
        Machine,
        processor=_text,
        instructions=_text,
        threads=_count,
        gpu=_maybe(_text),
        python=_text,
        torch=_text,
        twinfer=_text,
    ),
    repro=_text,
)


@given(row=_rows)
def test_a_row_comes_back_as_it_was(row: Row) -> None:
    line = row.to_json()
    assert "\n" not in line
    assert from_json(line) == row
    assert from_json(line).identity == row.identity


def test_what_was_not_measured_is_null(make_row: Callable[..., Row]) -> None:
    parts = json.loads(make_row(p50_s=None, speed_up=None).to_json())
    assert parts["p50_s"] is None
    assert parts["speed_up"] is None
    assert parts["compile_cold_s"] is None
    assert parts["schema"] == SCHEMA


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_is_finite_or_missing(make_row: Callable[..., Row], value: float) -> None:
    with pytest.raises(ValueError, match="p50_s"):
        make_row(p50_s=value)


def test_a_file_of_rows(make_row: Callable[..., Row], tmp_path: Path) -> None:
    rows = [make_row(), make_row(name="mlp", graph_breaks=("a.py:1: why",))]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_who_reads_meanwhile_reads_the_old_file(make_row: Callable[..., Row], tmp_path: Path) -> None:
    """A new file takes the old one's place in one step; nothing is written into the old one."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, [make_row()])
    with path.open() as reader:
        write_rows(path, [make_row(name="mlp")] * 3)
        assert reader.read() == make_row().to_json() + "\n"
    assert [row.name for row in read_rows(path)] == ["mlp"] * 3


def test_a_failed_write_leaves_the_old_file(make_row: Callable[..., Row], tmp_path: Path) -> None:
    """Whatever stops it halfway."""
    path = tmp_path / "rows.jsonl"
    write_rows(path, [make_row()])

    def broken_off() -> Any:
        yield make_row(name="mlp")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, broken_off())
    assert [row.name for row in read_rows(path)] == ["linear"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda line: line.replace(SCHEMA, "twinfer.bench/0"), "schema is 'twinfer.bench/0'"),
        (lambda line: line[:-2], "not a row of JSON"),
        (lambda line: line.replace('"storage"', '"storrage"'), "storrage"),
        (lambda line: line.replace('"kind": "op"', '"kind": "opp"'), "opp"),
        (lambda line: "[1]", "schema is None"),
    ],
)
def test_other_files_are_refused(
    make_row: Callable[..., Row], tmp_path: Path, change: Callable[[str], str], complaint: str
) -> None:
    """By file, line and what is wrong."""
    path = tmp_path / "rows.jsonl"
    line = make_row().to_json()
    path.write_text(f"{line}\n{change(line)}\n")
    with pytest.raises(RequestError, match="line 2") as caught:
        read_rows(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_rows_are_matched_by_what_they_measure(make_row: Callable[..., Row]) -> None:
    """Not by how fast they were, nor by the order in which axes are named."""
    reordered = make_row(shape={"N": 960, "I": 576, "T": 1, "B": 1}, p50_s=7.0)
    assert reordered.identity == make_row().identity
    others = (make_row(shape={"T": 2}), make_row(storage="int4"), make_row(implementation="x"), make_row(name="y"))
    assert len({make_row().identity, *(row.identity for row in others)}) == 5


def test_the_highest_limits_are_each_the_most(make_row: Callable[..., Row]) -> None:
    one = Limits(read_bytes_per_s=5.0, read_by="a", gemm_flops_per_s=7.0, gemm_by="b")
    other = Limits(read_bytes_per_s=4.0, read_by="c", gemm_flops_per_s=9.0, gemm_by="d")
    rows = [make_row(limits=None), make_row(limits=one), make_row(limits=other)]
    assert highest_limits(rows) == Limits(read_bytes_per_s=5.0, read_by="a", gemm_flops_per_s=9.0, gemm_by="d")
    assert highest_limits(rows[:1]) is None


def test_shapes_are_written_as_they_are_read() -> None:
    from twinfer.commands.bench_ops import shape

    sizes = {"B": 1, "T": 4, "N": 49152}
    assert shape(written(sizes)) == sizes
