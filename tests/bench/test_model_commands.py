"""`twinfer bench model` and `twinfer bench peers`, end to end on a tiny model that is not compiled."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.bench import footprint, limits, plan, products, side_by_side, switches
from twinfer.bench.candidates import Candidate
from twinfer.bench.footprint import Footprint
from twinfer.bench.peers import comparison
from twinfer.bench.peers.exported import Exports, write_gguf
from twinfer.bench.peers.subprocess_peer import SubprocessPeer
from twinfer.bench.peers.table import PEERS, Capacity
from twinfer.bench.rows import Limits, read_rows
from twinfer.bench.switches import SWITCHES
from twinfer.checkpoint import open_model
from twinfer.commands.main import main
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage
from twinfer.spec.errors import MachineError

from .tiny_llama import llama

SIZES = ["--rounds", "2", "--prompt", "6", "--steps", "2", "--batch", "3", "--prefill", "12", "--prefill", "9"]
FOOTPRINT = Footprint(
    storage="int8",
    compile_cold_s=21.0,
    compile_warm_s=2.0,
    weight_bytes=1000,
    step_s=0.01,
    outside_kernels=0.04,
    loops_a_layer=6.0,
    peak_bytes=400 * 2**20,
    beyond_torch_bytes=100 * 2**20,
)


@contextmanager
def here(name: str, model: str, folder: Path, capacity: Capacity) -> Iterator[Candidate]:
    """A peer in this process, which starts faster."""
    yield PEERS[name].make(Exports(open_model(model).source, folder), capacity)


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits, compiling and other processes have tests of their own."""
    monkeypatch.setattr(comparison, "start_peer", here)
    found = Limits(read_bytes_per_s=4e10, read_by="sum", gemm_flops_per_s=2e11, gemm_by="square")
    monkeypatch.setattr(limits, "measure_limits", lambda: found)
    monkeypatch.setattr(comparison, "measure_limits", lambda: found)
    monkeypatch.setattr(plan, "CompiledPath", partial(CompiledPath, mode="eager"))
    monkeypatch.setattr(products, "graph", lambda program, **_: program)
    monkeypatch.setattr(products, "LEAST_SAMPLE_S", 1e-5)
    monkeypatch.setattr(side_by_side, "PAUSE_S", 0.0)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    write_gguf(RandomSource(llama(), seed=3), tmp_path / "tiny.gguf")
    return str(tmp_path / "tiny.gguf")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["bench", *arguments])
    return status, capsys.readouterr().out


def peers(capsys: pytest.CaptureFixture[str], model: str, *more: str) -> tuple[int, str]:
    return run(capsys, "peers", model, *SIZES, "--peer", "transformers eager", "--square", "64", *more)


def test_peers_prints_every_storage_the_peer_and_the_ratios(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = peers(capsys, tiny)
    assert status == 0
    assert "decode batch 1, int8 over transformers eager" in out
    assert "llama.cpp F32, decode batch 1: not measured" in out
    for line in (*(f"compiled {each}" for each in ("float32", "bfloat16")), "transformers eager float32"):
        assert f"{line}: the reference's first 16 of 16 tokens; led by them, picks 16" in out


def test_peers_as_json_is_rows_and_ratios(tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out = peers(capsys, tiny, "--storage", "int8", "--json", "--out", str(tmp_path / "rows.jsonl"))
    assert status == 0
    told: dict[str, Any] = json.loads(out)
    done = {(row["implementation"], row["storage"], *row["shape"].values()) for row in told["rows"]}
    own = {("compiled", "int8", *shape) for shape in ((6, 1, 2), (6, 3, 2), (12, 1, 0), (9, 1, 0))}
    assert done == own | {("transformers eager", "float32", 6, 1, 2), ("transformers eager", "float32", 12, 1, 0)}
    for row in told["rows"]:
        assert row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert row["repeats"] == 2
        tokens = row["shape"]["batch"] if row["shape"]["steps"] else row["shape"]["prompt"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["p50_s"], rel=1e-12)
        same = (row["implementation"], *row["shape"].values()) == ("transformers eager", 6, 1, 2)
        assert row["speed_up"] == 1.0 or not same
    ratios = {each["name"]: each for each in told["targets"]}
    assert ratios["decode batch 1, int8 over transformers eager"]["value"] > 0
    assert ratios["decode batch 1, int8 over llama.cpp Q8_0"]["value"] is None
    assert {each["who"] for each in told["alone"]} == {"memory", "product"}
    assert [row.to_json() for row in read_rows(tmp_path / "rows.jsonl")] == [json.dumps(row) for row in told["rows"]]


def test_peers_in_subprocesses(
    tiny: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    started: list[subprocess.Popen[bytes]],
) -> None:
    """The same rows; nothing but JSON on the standard output of all processes, and none is left."""
    monkeypatch.setattr(comparison, "start_peer", SubprocessPeer)
    status, out = peers(capfd, tiny, "--storage", "int8", "--json")
    assert status == 0
    told: dict[str, Any] = json.loads(out)
    theirs = [row for row in told["rows"] if row["implementation"] == "transformers eager"]
    assert [row["shape"]["prompt"] for row in theirs] == [6, 12]
    assert all(row["error"] is None and row["p50_s"] > 0 for row in theirs)
    assert told["absent"] == {}
    assert told["agreements"]["transformers eager"] == {"alone": 16, "led": 16, "of": 16}
    (process,) = started
    assert process.returncode is not None


@pytest.mark.parametrize("fails", [None, "at the start", "when it is asked", "when it is timed"])
def test_a_peer_is_started_on_the_model_and_closed_whatever_becomes_of_it(
    fails: str | None, tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for the 16 tokens that are compared; its failure is told, and is nobody else's."""
    open_now: list[str] = []
    given: list[Capacity] = []

    class Peer:
        def __init__(self, candidate: Candidate) -> None:
            self.candidate = candidate

        def answer(self, *request: Any) -> Any:
            if fails == "when it is asked":
                raise MachineError("gone")
            return self.candidate.answer(*request)

        def seconds(self, *request: Any) -> float:
            if fails == "when it is timed":
                raise MachineError("gone")
            return 0.25

    @contextmanager
    def start(name: str, model: str, folder: Path, capacity: Capacity) -> Iterator[Candidate]:
        assert folder.is_dir()
        given.append(capacity)
        if fails == "at the start":
            raise MachineError("gone")
        open_now.append(name)
        with here(name, model, folder, capacity) as candidate:
            try:
                yield Peer(candidate)
            finally:
                open_now.remove(name)

    monkeypatch.setattr(comparison, "start_peer", start)
    status, out = peers(capsys, tiny, "--storage", "int8", "--json")
    assert status == 0
    assert given == [Capacity(decode_tokens=6 + 16, most_tokens=6 + 16, threads=torch.get_num_threads())]
    assert open_now == []
    told = json.loads(out)
    absent = {"transformers eager": "gone"} if fails in ("at the start", "when it is asked") else {}
    assert told["absent"] == absent
    found = {(row["implementation"], row["error"]) for row in told["rows"]}
    theirs = set() if absent else {("transformers eager", "gone" if fails else None)}
    assert found == {("compiled", None)} | theirs
    assert {row["p50_s"] for row in told["rows"] if row["implementation"] != "compiled"} <= {None if fails else 0.25}


def test_peers_are_closed_where_the_run_fails(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    @contextmanager
    def start(name: str, *given: Any) -> Iterator[Candidate]:
        with here(name, *given) as candidate:
            try:
                yield candidate
            finally:
                closed.append(name)

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(comparison, "start_peer", start)
    monkeypatch.setattr(comparison, "measure_in_turn", fail)
    with pytest.raises(ZeroDivisionError):
        peers(capsys, tiny, "--storage", "int8")
    assert closed == ["transformers eager"]


def test_a_ratio_that_is_required_and_missed_is_an_error(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers(capsys, tiny, "--storage", "int8", "--require")[0] == 1


@pytest.mark.parametrize(("command", "flag"), [("peers", "--peer"), ("model", "--out")])
def test_a_wish_that_cannot_be_met_is_refused_before_anything_runs(
    command: str, flag: str, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", command, tiny, *SIZES, flag, "nowhere/at all"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"twinfer: error: {flag} is ")
    assert len(error.splitlines()) == 1


def test_what_is_longer_than_the_context_is_refused(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("peers", "model"):
        assert main(["bench", command, tiny]) == 2
        assert "512 tokens; the model's context is 64" in capsys.readouterr().err


def test_a_model_that_peers_do_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", "minilm"]) == 2
    assert "no text can be continued" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_refused_in_a_line(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a wheel, which does not hold them."""
    monkeypatch.setattr("twinfer.commands.bench_peers.find_spec", lambda name: None)
    assert main(["bench", "peers", tiny]) == 2
    error = (
        "twinfer: error: twinfer bench peers is run from a checkout with the extra peers: pip install -e '.[peers]'\n"
    )
    assert capsys.readouterr().err == error


def test_perplexity_needs_a_tokenizer(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "perplexity", tiny]) == 2
    assert "has no tokenizer, which perplexity of a text needs" in capsys.readouterr().err


def test_model_puts_what_a_subprocess_measured_beside_its_speeds(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def measured(*what: object) -> Footprint:
        asked.append(what)
        return FOOTPRINT

    monkeypatch.setattr(footprint, "measure_footprint", measured)
    status, out = run(capsys, "model", tiny, *SIZES, "--storage", "int8", "--json")
    assert status == 0
    assert asked == [(tiny, "int8", 6, 2)]
    told = json.loads(out)
    with_compile = [row["shape"] for row in told["rows"] if row["compile_cold_s"] == 21.0]
    assert with_compile == [{"prompt": 6, "batch": 1, "steps": 2}]
    assert len(told["rows"]) == 4
    assert told["subprocess"][0]["allowed_bytes"] == 1500 + 150 * 2**20
    assert told["subprocess"][0]["outside_kernels"] == 0.04


def test_model_prints_both_tables(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "measure_footprint", lambda *what: FOOTPRINT)
    status, out = run(capsys, "model", tiny, *SIZES, "--storage", "int8", "--storage", "float32")
    assert status == 0
    words = [[word for word in line.split() if word != "│"] for line in out.splitlines()]
    assert ["int8", "21.0", "2.0", "0", "100", "150", "4.0", "%", "6"] in words
    assert [line[:2] for line in words if line[:1] == ["compiled"]] == [["compiled", "int8"], ["compiled", "float32"]]


def test_model_times_the_path_without_each_of_its_optimizations(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switches, "CompiledPath", partial(CompiledPath, mode="eager"))
    status, out = run(
        capsys, "model", tiny, *SIZES, "--storage", "float32", "--storage", "int8", "--switches", "--json"
    )
    assert status == 0
    told = json.loads(out)
    assert told["subprocess"] == []
    kinds = {"compiled", *(f"without {switch.name}" for switch in SWITCHES)}
    assert {(row["implementation"], row["storage"]) for row in told["rows"]} == {
        (kind, storage) for kind in kinds for storage in ("float32", "int8")
    }
    over = {(row["implementation"], row["storage"]): row["baseline"] for row in told["rows"]}
    assert (over["without CPU graphs", "int8"], over["compiled", "int8"]) == ("compiled int8", "compiled float32")
    assert all(row["speed_up"] > 0 for row in told["rows"])


def test_the_command_that_measures_a_row_again_is_one(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It parses, and asks for this storage at these sizes."""
    import shlex

    from twinfer.bench.plan import Plan
    from twinfer.commands.parser import parser

    _, out = peers(capsys, tiny, "--storage", "bfloat16", "--storage", "int8", "--json")
    for row in json.loads(out)["rows"]:
        args = parser().parse_args(shlex.split(row["repro"])[1:])
        again = Plan.of(args)
        assert (again.prompt, again.steps, again.batches, again.prefills) == (6, 2, (1, 3), (12, 9))
        assert "transformers eager" in args.peer
        if row["implementation"] == "compiled":
            assert again.storages == (Storage(row["storage"]),)
