"""What is measured of stores: rows follow from what was timed, and a table shows each of them."""

import json
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from twinfer.bench import expert_cache, memory_limit, offload_report, offload_settings
from twinfer.bench.memory_limit import Case, compared, limited
from twinfer.bench.offload_settings import SETTINGS, Setting, multiplied, run
from twinfer.bench.offload_timeline import timeline
from twinfer.bench.peers import offload as peer
from twinfer.compiled.path import CompiledPath
from twinfer.offload import measuring
from twinfer.offload.events import Event, Kind
from twinfer.offload.path import OffloadPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Head, Storage
from twinfer.spec.weights import tensors

from .tiny_llama import VOCABULARY, llama

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def quick(monkeypatch: Patch) -> None:
    """Paths run uncompiled, and speeds are measured for an instant."""
    for each in (OffloadPath, CompiledPath):
        monkeypatch.setattr(each, "__init__", partialmethod(each.__init__, mode="eager"))
    monkeypatch.setattr(measuring, "_ENOUGH_S", 0.01)
    monkeypatch.setattr(measuring, "_GEMM", 32)


@pytest.mark.parametrize("head", [Head.TIED, Head.UNTIED])
def test_each_token_is_multiplied_by_all_matrices_but_the_table(head: Head) -> None:
    """And by the table too where it is the head: counted here from the weights themselves."""
    config = llama(head=head)
    source = RandomSource(config, 1)
    parts = [source.layer(index) for index in range(len(config.layers))] + (
        [] if head is Head.TIED else [source.head()]
    )
    matrices = [each for part in parts for _, each in tensors(part) if each.ndim == 2]
    tied = VOCABULARY * config.hidden if head is Head.TIED else 0
    assert multiplied(config) == sum(each.numel() for each in matrices) + tied


@pytest.mark.parametrize("batch", [3, None])
def test_a_settings_shares_follow_from_its_seconds(batch: int | None, tmp_path: Path, monkeypatch: Patch) -> None:
    """Of the disk: bytes over seconds; of products: two for each weight and sequence. Auto is beside the resident."""
    config = llama()
    monkeypatch.setattr(offload_settings, "source_of", lambda model: RandomSource(config, 1))
    setting = Setting(model="tiny", storage=Storage.INT8, budget=10**7, batch=batch, prompt=4, reserve=20)
    row = run(tmp_path / "new" / "folder", setting)
    disk, gemm = (fmean(row[name]) * 1e9 for name in ("disk_gb_s", "gemm_gflop_s"))
    swept = row["share_of_disk"] * disk * row["measured_step_s"]
    schedule = offload_settings.store_of(tmp_path / "new" / "folder", setting)[0].schedule
    assert swept == pytest.approx(sum(record.nbytes for record in schedule))
    products = row["share_of_gemm"] * gemm * row["measured_step_s"]
    assert products == pytest.approx(2 * multiplied(config) * row["batch"])
    assert row["batch"] == (batch or row["batch"])
    assert row["planned"] <= row["budget"] == 10**7
    assert ("of_resident" in row) == (batch is None)
    assert min(row["predicted_step_s"], row["predicted_prompt_token_s"], row["measured_prompt_token_s"]) > 0


def test_prompts_are_timed_once_and_each_step_by_itself(monkeypatch: Patch) -> None:
    """A decoder that takes 5 s for prompts, then 1 to 12 s a step: the first of each of three rounds is left out."""
    clock = [0.0]
    monkeypatch.setattr(offload_settings.time, "perf_counter", lambda: clock[0])

    class Slow:
        config = llama()
        steps = 0

        def open(self, batch: int, reserve: int) -> Any:
            return SimpleNamespace(close=lambda: None)

        def extend(self, state: object, tokens: list[torch.Tensor]) -> None:
            if len(tokens) == 1:
                return
            single = len(tokens[0]) == 1
            self.steps += single
            clock[0] += self.steps if single else 5.0

    setting = Setting(model="", storage=Storage.INT8, budget=1, batch=2, prompt=4, reserve=20)
    slow, seen = Slow(), []
    found = offload_settings._timed([slow], setting, 2, lambda: seen.append(slow.steps))  # type: ignore[list-item]
    assert found == (4 + 6, 5.0, [[2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 10.0, 11.0, 12.0]])
    assert seen == [0, 4, 8, 12]


@pytest.fixture
def unlimited(monkeypatch: Patch, tmp_path: Path) -> Case:
    """Return a case that runs in this process, in no control group."""
    source = RandomSource(llama(), 5)
    case = Case(
        module="none", source=source, storage=Storage.FLOAT32, limit=lambda store: 4 * store.nbytes + 10**7, slack=10**6
    )
    monkeypatch.setattr(memory_limit, "PROMPT", (1, 2, 3))
    monkeypatch.setattr(memory_limit, "own_group", lambda: None)
    monkeypatch.setattr(
        memory_limit,
        "of_limited_process",
        lambda module, folder, mode: json.loads(json.dumps(limited(case, folder, mode))),
    )
    return case


def test_a_limited_run_is_compared_to_the_bit(unlimited: Case, tmp_path: Path) -> None:
    """With the model that was built it is the same; with one other weight it is not."""
    row = compared(unlimited, tmp_path / "s")
    assert row["same_tokens"]
    assert row["same_bits"]
    assert row["built_s"] > 0
    assert row["limited_by"].startswith("nothing")
    assert row["ratio"] == row["weights_bytes"] / row["limit_beyond_bytes"]
    assert row["plan"]["budget"] == row["limit_beyond_bytes"] - unlimited.slack
    assert row["share_of_disk"] == pytest.approx(row["read_bytes_a_step"] / row["token_s"] / row["disk_gb_s"] / 1e9)
    weight_NI = unlimited.source.layer(1).attention.query.weight_NI
    other = unlimited.source.layer

    def layer(index: int, shard: object = None) -> Any:
        made = other(index)
        if index == 1:
            made.attention.query.weight_NI[0, 0] = weight_NI[0, 0] + 1
        return made

    unlimited.source.layer = layer  # type: ignore[method-assign, assignment]
    again = compared(unlimited, tmp_path / "s")
    assert not again["same_bits"]
    assert again["built_s"] is None


def test_accelerate_yields_the_same_tokens_and_ratios_follow(tmp_path: Path, monkeypatch: Patch) -> None:
    """The same weights on accelerate's own disk offload: ratios are medians of steps taken in turn."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    monkeypatch.setattr(peer, "source_of", lambda model: RandomSource(llama(), 1))
    monkeypatch.setattr(offload_settings, "source_of", lambda model: RandomSource(llama(), 1))
    monkeypatch.setattr(peer, "PROMPT", (5, 3, 1))
    monkeypatch.setattr(peer, "STEPS", 1)
    row = peer.main(tmp_path, "tiny")
    assert row["same_tokens_float32"]
    for storage in ("float32", "int8"):
        assert row["of_accelerate"][storage] == row["step_s"]["accelerate"] / row["step_s"][storage]


def test_policies_reads_are_counted_over_the_fewest(monkeypatch: Patch) -> None:
    """A dense model is made a mixture; hit rates and reads are of the same count."""
    monkeypatch.setattr(expert_cache, "CompiledPath", CompiledPath)
    row = expert_cache.table(RandomSource(llama(), 2), [each % VOCABULARY for each in range(3, 99, 7)])
    assert (row["experts"], row["kept"], row["needed"]) == (2 * 8, 4, 14 * 2 * 2)
    best = (1 - row["best_hit_rate"]) * row["needed"]
    for each in row["policies"].values():
        assert each["over_best"] == pytest.approx((1 - each["hit_rate"]) * row["needed"] / best)
        assert each["over_best"] >= 1


def test_a_timeline_has_a_line_for_each_buffer_and_kind() -> None:
    """Its title is the share of reads within computing: 0.5 of 2 seconds."""
    events = [Event(Kind.READ, 1, 1, 0.0, 2.0), Event(Kind.USE, 0, 0, 1.5, 4.0), Event(Kind.WAIT, 1, 1, 4.0, 4.5)]
    axes = timeline(events).axes[0]
    assert [each.get_text() for each in axes.get_yticklabels()] == ["read, buffer 1", "use", "wait"]
    assert axes.get_title().startswith("25% of the time of reads")


def test_parts_that_are_there_are_not_measured_again(tmp_path: Path, monkeypatch: Patch) -> None:
    """Rows are kept by part, and read back as they were."""
    counts = []

    def part(folder: Path) -> Iterator[dict[str, int]]:
        counts.append(folder)
        yield {"a": 1}
        yield {"a": 2}

    monkeypatch.setitem(offload_report.PARTS, "part", part)
    for _ in range(2):
        assert offload_report.measured(tmp_path, "part") == [{"a": 1}, {"a": 2}]
    assert counts == [tmp_path]


def test_tables_show_what_was_measured(tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each part's rows, of which accelerate's stand beside the setting of their storage and one sequence."""
    setting = {
        "setting": "smollm2 int8, one sequence",
        "bytes": 136 * 10**6,
        "budget": 64 * 10**6,
        "planned": 52 * 10**6,
        "batch": 1,
        "predicted_step_s": 0.15,
        "measured_step_s": 0.12,
        "predicted_prompt_token_s": 0.008,
        "measured_prompt_token_s": 0.01,
        "share_of_disk": 0.95,
        "share_of_gemm": 0.02,
    }
    many = {**setting, "setting": "smollm2 int8, batch 8", "batch": 8}
    rows = {
        "stores": [{"storage": "int8", "bytes": 1234, "processor_s": 6.5, "passed_s": 7.25, "peak_bytes": 42 * 10**7}],
        "settings": [setting, many],
        "accelerate": [
            {
                "model": "smollm2",
                "step_s": {"accelerate": 1.5, "float32": 0.5, "int8": 0.125},
                "of_accelerate": {"float32": 3.1, "int8": 10.9},
                "same_tokens_float32": True,
            }
        ],
        "weights": [
            {
                "reserve": 256,
                "share": 0.2,
                "kept_bytes": 46 * 10**6,
                "read_bytes": 239 * 10**6,
                "batch": 9,
                "reading_s": 0.25,
                "computing_s": 0.125,
                "step_s": 0.26,
                "tokens_per_s": 34.6,
            }
        ],
        "limited": [
            {
                "bench": "beyond_memory",
                "weights_bytes": 2148 * 10**6,
                "limit_beyond_bytes": 859 * 10**5,
                "ratio": 25.0,
                "interpreter_bytes": 318 * 10**6,
                "peak_beyond_bytes": 734 * 10**5,
                "read_bytes_a_step": 2081 * 10**6,
                "token_s": 2.3,
                "share_of_disk": 0.97,
                "same_tokens": True,
                "same_bits": False,
            }
        ],
        "policies": [
            {
                "model": "tiny-moe",
                "tokens": 512,
                "policies": {"least recently used": {"hit_rate": 0.24, "over_best": 1.44}},
                "best_hit_rate": 0.47,
            }
        ],
    }
    monkeypatch.setattr(offload_report, "measured", lambda folder, part: rows[part])
    offload_report.main(tmp_path, list(rows))
    said = capsys.readouterr().out
    for line in (
        "| int8 | 1,234 | 7.2 | 6.5 | 420 |",
        "| smollm2 int8, one sequence | 136 | 64 / 52 | 2.1 | 1 | 0.1500 / 0.1200 (1.25) | 0.0080 / 0.0100 (0.80) "
        "| 0.95 | 0.02 | 10.9 |",
        "| smollm2 int8, batch 8 | 136 | 64 / 52 | 2.1 | 8 | 0.0187 / 0.0150 (1.25) | 0.0080 / 0.0100 (0.80) "
        "| 0.95 | 0.02 |  |",
        "| smollm2 | 1.500 | float32 | 0.500 | 3.1 | yes |",
        "| smollm2 | 1.500 | int8 | 0.125 | 10.9 |  |",
        "| 256 | 20% | 46 / 239 | 9 | 0.25 / 0.12 | 0.26 | 35 |",
        "| beyond_memory | 2148.0 | 85.9 | 25.0 | 318.0 | 73.4 | 2081.0 | 2.30 | 0.97 | yes | no |",
        "| least recently used | 1.440 (24%) |",
        "| knows the future | 1 (47%) |",
    ):
        assert line in said


def test_a_bench_that_fails_is_said_and_yields_no_rows(capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    """Others go on."""
    monkeypatch.setattr(sys, "executable", "false")
    assert offload_report.of_bench("peers.offload", "x") == []
    assert "twinfer.bench.peers.offload x ended with status 1" in capsys.readouterr().err


def test_all_settings_of_the_report_are_there() -> None:
    """Six, by their names."""
    assert len(set(offload_report.SETTINGS) & set(SETTINGS)) == 6
