"""Rows as a run might have measured them."""

import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from twinfer.bench.rows import Kind, Limits, Machine, Row

ROW = Row(
    kind=Kind.OP,
    name="linear",
    shape={"B": 1, "T": 1, "I": 576, "N": 960},
    storage="int8",
    implementation="compiled",
    baseline="eager",
    p20_s=0.9e-4,
    p50_s=1e-4,
    p80_s=1.2e-4,
    speed_up=3.0,
    speed_up_p20=2.8,
    speed_up_p80=3.1,
    bytes=600_000,
    flops=1_200_000,
    gb_per_s=6.0,
    gflop_per_s=12.0,
    limits=Limits(read_bytes_per_s=4e10, read_by="sum", gemm_flops_per_s=2e11, gemm_by="square"),
    machine=Machine(
        processor="a CPU", instructions="AVX2", threads=2, gpu=None, python="3.11", torch="2.13", twinfer="0.1"
    ),
    repro="twinfer bench ops --op linear",
)


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row like `ROW`, but for what is given; `ratio` = (p20, p50, p80) of the speed-up.

    Its seconds are those of a baseline that takes 0.3 ms.
    """

    def make(ratio: tuple[float, float, float] | None = None, **changes: Any) -> Row:
        if ratio is not None:
            figures = dict(zip(("speed_up_p20", "speed_up", "speed_up_p80"), ratio, strict=True))
            seconds = dict(zip(("p80_s", "p50_s", "p20_s"), (3e-4 / each for each in ratio), strict=True))
            changes = {**figures, **seconds, **changes}
        return replace(ROW, **changes)

    return make


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list["subprocess.Popen[bytes]"]:
    """The subprocesses that are started from here on."""
    every: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> "subprocess.Popen[bytes]":
        every.append(start(*arguments, **options))
        return every[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    return every
