"""The command line of stores: batches whose results are kept, plans, checks, and what is refused before it begins."""

import json
import os
import re
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

from twinfer.checkpoint import Checkpoint
from twinfer.commands.main import main
from twinfer.offload import measuring
from twinfer.offload.path import OffloadPath
from twinfer.offload.store import open_store
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.parallel import ParallelConfig
from twinfer.stores import build_store

from ..api.conftest import END, byte_tokenizer, tiny_config

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
PROMPTS = ["abc", "the second one", "x", "a prompt", "and another"]
NOTHING: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
LIMITS = ["--memory-budget", "20MB", "--max-new-tokens", "4", "--seed", "5", "--temperature", "1"]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Return a store of a model that speaks bytes; paths run uncompiled, and speeds are measured for an instant."""
    monkeypatch.setattr(OffloadPath, "__init__", partialmethod(OffloadPath.__init__, mode="eager"))
    monkeypatch.setattr(measuring, "_ENOUGH_S", 0.01)
    monkeypatch.setattr(measuring, "_memory", lambda device: 1e9)
    monkeypatch.setattr(measuring, "_gemm", lambda device: 1e9)
    config = tiny_config()
    tiny = Checkpoint(
        name="tiny",
        source=RandomSource(config),
        config=config,
        tokenizer=byte_tokenizer(),
        end_tokens=(END,),
        chat_template=None,
        special_tokens={},
    )
    build_store(tiny, tmp_path / "s", Storage.FLOAT32, lambda line: None)
    return tmp_path / "s"


def batches(store: Path, *options: str, prompts: list[str] = PROMPTS) -> tuple[list[str], Path]:
    """Return a command that runs the prompts, and the file its results go to."""
    file, out = store.parent / "prompts.txt", store.parent / "out.jsonl"
    file.write_text("".join(f"{each}\n" for each in prompts))
    return ["generate", str(store), *LIMITS, "--prompts-file", str(file), "--output", str(out), *options], out


def results(file: Path) -> dict[int, dict[str, object]]:
    """Return the lines of a file of results by prompt; none is there twice."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {each["prompt"]: each for each in lines}
    assert len(found) == len(lines)
    return found


def refused(command: list[str], capsys: Capture, words: str) -> str:
    """Run a command that ends with status 2, nothing on standard output, and one line that matches; returns it."""
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr()
    *_, last = said.err.splitlines()
    assert said.out == ""
    assert re.fullmatch(f"twinfer: error: .*{words}.*", last)
    return last


def test_batches_yield_what_the_prompts_yield_together(store: Path, capsys: Capture) -> None:
    """With the plan's own batch and with any other; progress is told, and what was done."""
    command, out = batches(store)
    assert main([*command[:-4], "--prompts-file", command[-3], "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["outputs"]
    for size in ("auto", "2"):
        assert main([*command, "--batch", size]) == 0
        said = capsys.readouterr()
        found = results(out)
        assert [{key: found[index][key] for key in each} for index, each in enumerate(expected)] == expected
        told = re.fullmatch(rf"{out}: 5 results, 5 of them new, (\d+) at a time\n", said.out)
        assert told is not None
        assert size in ("auto", told[1])
        assert re.search(r"^5 of 5 prompts, 0 s left$", said.err, re.MULTILINE)
        out.unlink()


def test_a_run_goes_on_with_the_prompts_that_have_no_result(store: Path, capsys: Capture) -> None:
    """Cut in the midst of a line: whole lines stay as they are, the others come to the same."""
    command, out = batches(store, "--batch", "auto")
    assert main(command) == 0
    whole, expected = out.read_bytes(), results(out)
    cut = whole.index(b"\n", whole.index(b"\n") + 1) + 9
    out.write_bytes(whole[:cut])
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr()
    assert "5 results, 3 of them new" in said.out
    assert "5 of 5 prompts" in said.err
    assert out.read_bytes()[: cut - 8] == whole[: cut - 8]
    assert results(out) == expected
    assert main(command) == 0
    assert "5 results, 0 of them new" in capsys.readouterr().out


def test_batches_that_cannot_be_run_are_refused(store: Path, capsys: Capture) -> None:
    """With what would be right, before results of others are touched."""
    command, out = batches(store, "--batch", "auto")
    refused([*command[:-4], "--batch", "auto"], capsys, "--batch is given without --output")
    without = [word for word in command if word not in ("--memory-budget", "20MB")]
    refused(without, capsys, "a store runs within a memory budget, which is not given")
    said = refused([*command, "--memory-budget", "1KB"], capsys, "1 sequences of 18 tokens")
    smallest = said.rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", "")
    refused([*command[:-1], "5", "--memory-budget", smallest], capsys, "5 sequences of 18 tokens")
    refused([*command, "--storage", "int8"], capsys, "int8")
    assert not out.exists()
    assert main(command) == 0
    whole = out.read_bytes()
    assert main([*command, "--memory-budget", smallest]) == 0
    for other in (["--seed", "6"], ["--temperature", "0"], ["--max-new-tokens", "3"], ["--stop", "e"]):
        refused([*command, *other], capsys, "line 1 is no result of these prompts and options")
    changed, _ = batches(store, "--batch", "auto", prompts=["other", *PROMPTS[1:]])
    refused(changed, capsys, "is no result of these prompts and options")
    assert out.read_bytes() == whole
    refused([*command[:-4], "--output", str(store / "no" / "out"), "--batch", "auto"], capsys, "cannot be written")


def test_devices_that_a_store_cannot_be_for_are_refused(store: Path, capsys: Capture, tmp_path: Path) -> None:
    """A run on another type of device than it was built for, a type that there is not, and many ranks on GPUs."""
    tiny = Checkpoint(name="tiny", source=RandomSource(tiny_config()), config=tiny_config(), **NOTHING)
    build_store(tiny, tmp_path / "c", Storage.FLOAT32, lambda line: None, device="cuda")
    refused(["generate", str(tmp_path / "c"), *LIMITS, "--prompt-ids", "1,2"], capsys, "was built for cuda")
    with pytest.raises(RequestError, match="device is 'tpu'; a store is built for cpu or cuda"):
        build_store(tiny, tmp_path / "d", Storage.FLOAT32, lambda line: None, device="tpu")
    with pytest.raises(RequestError, match="for many ranks is built for cpu only"):
        build_store(tiny, tmp_path / "d", Storage.FLOAT32, lambda line: None, ParallelConfig(tensor=2), "cuda")
    assert not (tmp_path / "d").exists()


def test_a_plan_that_does_not_fit_names_the_smallest_that_does(store: Path, capsys: Capture) -> None:
    """That one is planned and stays within itself; a byte less is refused."""
    command = ["offload", "plan", str(store), "--batch", "3", "--tokens", "30", "--memory-budget"]
    said = refused([*command, "1KB"], capsys, "3 sequences of 30 tokens")
    smallest = int(said.rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))
    refused([*command, str(smallest - 1)], capsys, f"the smallest that works is {smallest:,} bytes")
    assert main([*command, str(smallest), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["budget"], plan["batch"], plan["reserve"]) == (smallest, 3, 30)
    assert plan["total_bytes"] == smallest


@pytest.mark.parametrize("batch", ["4", "auto"])
def test_a_plan_is_told_in_words_and_as_json(batch: str, store: Path, capsys: Capture) -> None:
    """Both name each purpose; what is predicted follows from what was measured in the same run."""
    command = ["offload", "plan", str(store), "--batch", batch, "--tokens", "30", "--memory-budget", "1MB"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    planned, predicted = found["plan"], found["prediction"]
    assert planned["batch"] == 4 if batch == "4" else planned["batch"] >= 1
    assert planned["total_bytes"] <= 10**6
    assert predicted["token_s"] == predicted["step_s"] / planned["batch"]
    assert predicted["step_s"] >= 0.99 * max(
        planned["step_bytes"] / found["speeds"]["disk"], sum(found["step"]["computing"].values())
    )
    assert main(command) == 0
    lines = capsys.readouterr().out
    for name in planned:
        assert re.search(rf"^ *{name} +[\d,]+$", lines, re.MULTILINE)
    assert re.search(r"^a prompt token: \d\.\d{5} s$", lines, re.MULTILINE)
    assert re.search(r"^reads are hidden from \d+ tokens a step on$", lines, re.MULTILINE)


def test_a_check_says_what_is_there(store: Path, capsys: Capture) -> None:
    """The number of records and bytes, in words and as JSON."""
    held = open_store(store)
    assert main(["offload", "check", str(store)]) == 0
    words = f"{store}: {len(held.records)} records, {held.nbytes:,} bytes, all as they were written\n"
    assert capsys.readouterr().out == words
    assert main(["offload", "check", str(store), "--json"]) == 0
    expected = {"store": str(store), "records": len(held.records), "bytes": held.nbytes}
    assert json.loads(capsys.readouterr().out) == expected


def test_a_check_names_what_is_damaged(store: Path, capsys: Capture) -> None:
    """In one line each: a flipped bit by layer and tensor, a store that was cut, and what is no store."""
    command = ["offload", "check", str(store)]
    held = open_store(store)
    record = held.layers[1]
    word = next(each for each in record.tensors() if each.name.startswith("qkv") and each.nbytes)
    whole = held.weights.read_bytes()
    damaged = bytearray(whole)
    damaged[record.offset + word.offset] ^= 16
    held.weights.write_bytes(damaged)
    refused(command, capsys, f"{record.name}, {re.escape(word.name)} is damaged, its checksum is another")
    assert "layer 1" in record.name
    held.weights.write_bytes(whole)
    os.truncate(held.weights, len(whole) - 1)
    refused(command, capsys, f"must have {len(whole):,}")
    held.weights.unlink()
    refused(command, capsys, "cannot be read: No such file or directory")
    refused(["offload", "check", str(store.parent)], capsys, str(store.parent))
    refused(["offload", "check", str(store / "nothing")], capsys, "nothing")
