"""`twinfer bench moe`, end to end on tiny mixtures that are not compiled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.bench import compiling, limits, mixtures, moe, moe_generation, timing
from twinfer.bench.limits import Probe, Probes
from twinfer.bench.mixtures import MIXTURES, Mixture, chosen_bytes, draw_weights, prepare_mixture
from twinfer.bench.moe_chart import experts_chart
from twinfer.bench.peers.mixtures import peers_of
from twinfer.bench.rows import read_rows
from twinfer.commands.main import main
from twinfer.compiled.path import CompiledPath
from twinfer.oracle.models import RandomSource
from twinfer.reference.moe import moe as reference_moe
from twinfer.spec.config import Storage

from .tiny_llama import llama


def tiny(mixture: Mixture) -> Mixture:
    config = mixture.config
    router, expert = replace(config.router, experts=4, top_k=2), replace(config.expert, width=16)
    return replace(mixture, hidden=16, config=replace(config, router=router, expert=expert))


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes and compiling have tests of their own."""
    values = torch.ones(1000)
    read = Probe(name="sum", call=lambda: values.sum(), amount=values.nbytes, rate=1.0)
    gemm = Probe(name="dot", call=lambda: values @ values, amount=2000, rate=1.0)
    monkeypatch.setattr(limits, "find_probes", lambda *_, **__: Probes(read=read, gemm=gemm))
    monkeypatch.setattr(compiling, "start_compiler", lambda device: None)
    monkeypatch.setattr(timing, "LEAST_SAMPLE_S", 1e-6)
    monkeypatch.setattr(mixtures, "graph", lambda program: program)
    monkeypatch.setattr(moe, "graph", lambda program: program)
    monkeypatch.setattr(moe, "DISPATCH_EXPERTS", 4)
    monkeypatch.setattr(moe, "DISPATCH_HIDDEN", 8)
    monkeypatch.setattr(moe, "EXPERTS", (2, 4))
    monkeypatch.setattr(moe, "EXPERTS_TOKENS", 3)
    monkeypatch.setattr(mixtures, "MIXTURES", {name: tiny(each) for name, each in MIXTURES.items()})


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", "moe", "--rounds", "2", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_dispatch_is_timed_at_every_capacity(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of 6 tokens an expert of 4 serves 2 top-1 and 3 top-2, or the least of 4; a target is for each."""
    found = told(capsys, "--part", "dispatch", "--tokens", "6", "--out", str(tmp_path / "rows.jsonl"))
    sizes = [(row["shape"]["K"], row["shape"]["C"], row["implementation"]) for row in found["rows"]]
    forms = ("tables", "one-hot einsums")
    assert sizes == [(k, places, form) for k, places in ((1, 2), (1, 4), (2, 3), (2, 4)) for form in forms]
    assert [each["bound"] for each in found["targets"]] == [6.0] * 4
    for target, (tables, one_hot) in zip(found["targets"], zip(*[iter(found["rows"])] * 2, strict=True), strict=True):
        assert target["value"] == pytest.approx(tables["speed_up"], rel=1e-12)
        assert one_hot["speed_up"] == 1.0
    assert [row.to_json() for row in read_rows(tmp_path / "rows.jsonl")] == [json.dumps(row) for row in found["rows"]]


def test_a_layer_stands_beside_its_floor_and_its_peers(capsys: pytest.CaptureFixture[str]) -> None:
    """Own time over the floor is one over the share of the limit, of the median; peers are float32's only."""
    found = told(capsys, "--part", "layer", "--mixture", "mixtral", "--tokens", "1", "--tokens", "8", "--tokens", "9")
    own = [row for row in found["rows"] if row["implementation"] == "compiled"]
    assert [(row["rows"], row["storage"]) for row in own] == [(n, s) for n in (1, 8, 9) for s in ("float32", "int8")]
    targets = {each["name"]: each for each in found["targets"]}
    floor = targets["mixtral, 1 token, float32, time over its floor"]
    assert floor["at_most"]
    assert floor["p20"] <= 1 / own[0]["share_of_limit"] * (1 + 1e-9)
    assert floor["p80"] >= 1 / own[0]["share_of_limit"] * (1 - 1e-9)
    assert targets["mixtral, 1 token, int8 over float32"]["value"] > 0
    assert targets["mixtral, 8 tokens, float32 over transformers's fastest"]["over"].startswith("transformers ")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_transformers_blocks_compute_the_same_layer(name: str) -> None:
    """As far apart as sums in another order are: so many units in the last place as a sum has terms."""
    mixture = tiny(MIXTURES[name])
    weights = draw_weights(mixture, 3)
    x_TM = torch.randn(5, mixture.hidden, generator=torch.Generator().manual_seed(1))
    wanted_TM = reference_moe(x_TM[None], weights, mixture.config)[0]
    peers = peers_of(mixture, weights)
    assert list(peers) == ["transformers eager", "transformers batched_mm", "transformers grouped_mm"]
    terms = 2 * mixture.hidden + mixture.config.expert.width
    for peer in peers.values():
        assert not isinstance(peer, str), peer
        off = (peer(x_TM) - wanted_TM).abs().max()
        assert off <= terms * torch.finfo(torch.float32).eps * wanted_TM.abs().max()


def test_a_missing_peer_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinfer.bench.peers.mixtures.find_spec", lambda name: None)
    mixture = tiny(MIXTURES["deepspeed"])
    assert peers_of(mixture, draw_weights(mixture, 0)) == {"deepspeed": "not installed (pip install deepspeed)"}


@pytest.mark.parametrize("storage", Storage)
def test_the_floor_reads_the_router_and_the_experts_that_are_chosen(storage: Storage) -> None:
    """Two of four where all tokens are alike, each once."""
    mixture = tiny(MIXTURES["mixtral"])
    prepared = prepare_mixture(draw_weights(mixture, 0), storage)
    x_TM = torch.randn(1, mixture.hidden).expand(7, -1)
    every = sum(part.nbytes for matrix in prepared.experts for part in matrix if isinstance(part, torch.Tensor))
    assert chosen_bytes(x_TM, prepared, mixture) == prepared.router.word.nbytes + every // 2


def test_a_chart_is_drawn_over_experts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its lines are the rows' own milliseconds, their share that is the floor's, and the reads of all experts."""
    out = tmp_path / "rows.jsonl"
    found = told(capsys, "--part", "experts", "--charts", str(tmp_path), "--out", str(out))
    assert [(row["shape"]["E"], row["storage"]) for row in found["rows"]] == [
        (experts, storage) for experts in (2, 4) for storage in ("float32", "int8")
    ]
    assert (tmp_path / "moe-experts.png").read_bytes().startswith(b"\x89PNG")
    rows = read_rows(out)
    shares = [replace(row, share_of_limit=0.25) for row in rows]
    drawn: Any = experts_chart(shares[::-1]).axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn.get_lines()}
    expected: dict[str, tuple[list[int], list[float]]] = {}
    for storage in ("float32", "int8"):
        of_storage = [1e3 * (row.p50_s or 0) for row in rows if row.storage == storage]
        expected[f"compiled {storage}"] = [2, 4], pytest.approx(of_storage)
        expected[f"floor of the chosen, {storage}"] = [2, 4], pytest.approx([each / 4 for each in of_storage])
    expert = 3 * 4 * rows[0].shape["M"] * rows[0].shape["F"]
    of_float32 = [(row.shape["E"], row.limits) for row in rows if row.storage == "float32"]
    reads_ms = [
        1e3 * experts * expert / found_limits.read_bytes_per_s for experts, found_limits in of_float32 if found_limits
    ]
    expected["reading every expert, float32"] = [2, 4], pytest.approx(reads_ms)
    assert lines == expected


def test_generation_is_over_the_reference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twinfer.bench.peers.exported import write_gguf

    monkeypatch.setattr(moe_generation, "CompiledPath", lambda source: CompiledPath(source, mode="eager"))
    monkeypatch.setattr("twinfer.bench.side_by_side.PAUSE_S", 0.0)
    write_gguf(RandomSource(llama(), seed=3), tmp_path / "tiny.gguf")
    found = told(capsys, "--part", "generation", "--model", str(tmp_path / "tiny.gguf"))
    assert [row["implementation"] for row in found["rows"]] == ["compiled", "reference"]
    assert found["targets"][0]["value"] == pytest.approx(found["rows"][0]["speed_up"], rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mixture", "mixtrel"],
            "--mixture is 'mixtrel'; the layers that are timed are mixtral, qwen3-moe, deepspeed",
        ),
        (["--part", "layer", "--charts", "."], "--charts draws the part experts, which --part leaves out"),
        (["--out", "/no/such/folder/rows"], "its folder /no/such/folder is not there"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "find_probes", lambda *_, **__: pytest.fail("it measures"))
    assert main(["bench", "moe", *arguments]) == 2
    assert message in capsys.readouterr().err
