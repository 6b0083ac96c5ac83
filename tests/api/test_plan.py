"""`twinfer plan`: the figures of `spec.plan` as text, as JSON and in the docs; what fits no job is refused."""

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from twinfer.commands.main import main
from twinfer.spec.config import Storage
from twinfer.spec.paper_models import PAPER_MODELS
from twinfer.spec.parallel import Exchange, ParallelConfig
from twinfer.spec.plan import rank_bytes, traffic, whole_bytes

PAGE = Path(__file__).parent.parent.parent / "docs" / "plan.md"
WORDS = ["plan", "24b-moe-128", "--gpus", "256", "--tensor", "8", "--expert", "128", "--expert-slices", "2"]
PARALLEL = ParallelConfig(data=32, tensor=8, expert=128, expert_slices=2)
CONFIG = PAPER_MODELS["24b-moe-128"].config


def report_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_json_and_text_tell_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    """Every step's calls, messages and bytes, what a rank holds, and sums for each token: of all 32 data groups."""
    report = report_of([*WORDS, "--tokens", "3"], capsys)
    steps = traffic(CONFIG, PARALLEL, tokens=3)
    assert [tuple(each.values()) for each in report["traffic"]] == [
        (each.step, each.collective, each.calls, each.messages, whole_bytes(each.bytes)) for each in steps
    ]
    held = rank_bytes(CONFIG, PARALLEL, 0, Storage.BFLOAT16)
    assert report["stages"] == [{"rank": 0, "bytes": held}]
    assert report["messages_per_token"] * 96 == sum(each.messages for each in steps)
    assert report["bytes_per_token"] * 96 == sum((each.bytes for each in steps), Fraction())
    assert list(report["degrees"].values()) == [32, 1, 8, 128, 2, "direct"]
    assert main([*WORDS, "--tokens", "3"]) == 0
    text = capsys.readouterr().out
    assert "24b-moe-128 on 256 ranks: data 32, pipeline 1, tensor 8, expert 128, expert slices 2, direct" in text
    assert f"rank 0 holds {held / 1e9:.3f} GB of bfloat16 weights" in text
    assert f"a token: {report['messages_per_token']:,.1f} messages and {report['bytes_per_token']:,.1f} bytes" in text
    rows = [[cell.strip() for cell in re.split("[│|]", line)[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [
        [each.step, each.collective, *(f"{n:,}" for n in (each.calls, each.messages, whole_bytes(each.bytes)))]
        for each in steps
    ]


@pytest.mark.parametrize("storage", [Storage.INT8, Storage.FLOAT32])
def test_stages_storage_and_exchange_are_passed_on(storage: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "47b-moe-128", "--gpus", "256", "--pipeline", "2", "--tensor", "4", "--expert", "128"]
    report = report_of([*words, "--exchange", "coordinated", "--storage", storage.value], capsys)
    parallel = ParallelConfig(data=32, pipeline=2, tensor=4, expert=128, exchange=Exchange.COORDINATED)
    config = PAPER_MODELS["47b-moe-128"].config
    assert report["stages"] == [
        {"rank": rank, "bytes": rank_bytes(config, parallel, rank, storage)} for rank in (0, 128)
    ]
    assert [each["messages"] for each in report["traffic"]] == [each.messages for each in traffic(config, parallel)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("24b-moe-128 --gpus 0", "--gpus is 0; it must be at least 1"),
        ("24b-moe-128 --tokens 0", "--tokens is 0; it must be at least 1"),
        ("24b-moe-128 --gpus 8 --pipeline 0", "--pipeline is 0; it must be at least 1"),
        ("24b-moe-128 --gpus 8 --tensor -1", "--tensor is -1; it must be at least 1"),
        ("24b-moe-128 --gpus 256 --tensor 7", "--gpus is 256, which does not divide by .* = 1 * 7; .* stage is 8"),
        ("24b-moe-128 --gpus 256 --tensor 128", "tensor is 128, but layer 0 has 64 query heads, .* it is 64"),
        ("24b-moe-128 --gpus 256 --expert 100", "100 * 1, but a stage has .* = 256 ranks, .* works is 128 * 1"),
        ("24b-moe-128 --gpus 256 --expert 256", "expert is 256, but layer 1 has 128 experts, .* that works is 128"),
        ("24b-moe-128 --gpus 3 --expert-slices 3", "expert_slices is 3, but layer 1 has experts of width 32768, .* 1$"),
        ("lm-175b --gpus 97 --pipeline 97", "pipeline is 97, but the model has 96 layers .* that works is 96"),
        ("lm-175b --gpus 2 --expert 2", "expert * expert_slices is 2 * 1, but the model has no experts"),
        ("gpt-j-6b-moe --gpus 2", "there is no model 'gpt-j-6b-moe': .*; by config alone, also gpt2-1.5b, .*24b-moe"),
    ],
)
def test_what_fits_no_job_is_refused(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the thing, its value, and the nearest that works; nothing is printed besides."""
    assert main(["plan", *words.split()]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert re.search(message.replace(" * ", r" \* "), seen.err), seen.err


PAPER = [  # Table II of the paper: GPUs, tensor, expert, expert slices
    ("1.3b-moe-128", 128, 1, 128, 1),
    ("2.4b-moe-128", 128, 1, 128, 1),
    ("8b-moe-128", 128, 4, 128, 1),
    ("24b-moe-128", 256, 8, 128, 2),
    ("47b-moe-128", 256, 8, 128, 2),
]


def test_the_page_shows_the_models_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Each row is what the command says."""
    rows = []
    for name, gpus, tensor, expert, slices in PAPER:
        words = f"plan {name} --gpus {gpus} --tensor {tensor} --expert {expert} --expert-slices {slices}".split()
        direct, coordinated = (report_of([*words, "--exchange", each], capsys) for each in ("direct", "coordinated"))
        cells = [name, gpus, tensor, expert, slices, f"{direct['stages'][0]['bytes'] / 1e9:.2f}"]
        for report in (direct, coordinated):
            to_experts = sum(each["messages"] for each in report["traffic"] if each["collective"] == "all_to_all")
            tokens = report["degrees"]["data"]
            cells += [f"{to_experts / tokens:,.0f}", f"{report['bytes_per_token'] / 1e6:.2f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    page = PAGE.read_text().splitlines()
    first = page.index(next(line for line in page if line.startswith("| 1.3b-moe-128")))
    assert page[first : first + len(rows)] == rows, "\n".join(rows)
