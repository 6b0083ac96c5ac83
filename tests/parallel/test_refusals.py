"""Degrees that a model cannot be divided by, and what else many ranks cannot do, are refused before any is started."""

from dataclasses import replace
from typing import Any

import pytest

from twinfer.checkpoint import Checkpoint
from twinfer.commands.main import main
from twinfer.converting import convert
from twinfer.oracle.models import RandomSource
from twinfer.parallel import launch
from twinfer.spec.config import Storage

from ..bench.tiny_llama import llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of one layer with 9 heads over 3 of keys and values, and such a store."""
    whole = llama(layers=1)
    layer = whole.layers[0]
    attention = replace(layer.attention, heads=9, kv_heads=3, head_size=64)
    layer = replace(layer, attention=attention, mlp=replace(layer.mlp, width=288))
    nothing: dict[str, Any] = {"tokenizer": None, "end_tokens": (), "chat_template": None, "special_tokens": {}}
    config = replace(whole, layers=(layer,))
    folder = tmp_path_factory.mktemp("models")
    checkpoint = Checkpoint(name="tiny", source=RandomSource(config), config=config, **nothing)
    convert(checkpoint, folder / "tiny", Storage.FLOAT32, lambda line: None)
    assert main(["offload", "build", str(folder / "tiny"), str(folder / "store")]) == 0
    return {"MODEL": str(folder / "tiny"), "STORE": str(folder / "store")}


HEADS = "layer 0 has 9 query heads, which do not divide by it; the nearest number that can share it is"
NO_EXPERTS = "but the model has no experts; the only degrees that work are 1 * 1"
STAGE = "which do not divide by it; the nearest that works is"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("MODEL --tensor 2", f"tensor is 2, but {HEADS} 1 or 3"),
        ("MODEL --tensor 7", f"tensor is 7, but {HEADS} 9"),
        ("MODEL --tensor 3 --storage int4", "int4 is cut at multiples of 64 only; the nearest number that can share"),
        ("MODEL --pipeline 2", "pipeline is 2, but the model has 1 layers and every stage needs one; the nearest that"),
        ("MODEL --tensor 3 --expert 3", f"expert * expert_slices is 3 * 1, {NO_EXPERTS}"),
        ("MODEL --tensor 3 --expert-slices 3", f"expert * expert_slices is 1 * 3, {NO_EXPERTS}"),
        ("MODEL --tensor 3 --expert 2", f"is 2 * 1, but a stage has data * tensor = 3 ranks, {STAGE} 1 * 1"),
        ("MODEL --data 1000000007 --expert 500000000", f"has data * tensor = 1000000007 ranks, {STAGE} 1 * 1"),
        ("MODEL --data 100000", "data * pipeline * tensor is 100000; at most 256 ranks are started on one machine"),
        ("MODEL --data 2 --tensor 3 --exchange coordinated", "expert is 1, which does not divide by tensor = 3: take"),
        ("MODEL --data 2 --exchange best", "invalid choice: 'best' (choose from"),
        ("MODEL --tensor 0", "'0' is not a number of at least 1"),
        ("MODEL --pipeline -1", "'-1' is not a number of at least 1"),
        ("MODEL --data 1.5", "'1.5' is not a number of at least 1"),
        ("MODEL --expert two", "'two' is not a number of at least 1"),
        ("MODEL --data 2 --path reference", "--path is reference; many ranks run the path compiled"),
        (
            "MODEL --data 2 --memory-budget 1GB",
            "--memory-budget bounds a store, which this model is not; make one of it",
        ),
        ("STORE --data 2", "a store runs within a memory budget, which is not given; give each rank one"),
        ("MODEL --data 2 --device cuda:99", "device is 'cuda:99'; on this machine it must be one of cpu"),
        ("MODEL --data 2 --device gpu", "'gpu'"),
        ("tiny-moe --tensor 4", "2 query heads, which do not divide by it; the nearest number that can share it is 2"),
        ("tiny-moe --data 3 --expert 3", f"expert is 3, but layer 1 has 8 experts, {STAGE} 1"),
        ("tiny-moe --data 12 --expert 3", f"expert is 3, but layer 1 has 8 experts, {STAGE} 2"),
        ("tiny-moe --data 16 --expert 16", f"expert is 16, but layer 1 has 8 experts, {STAGE} 8"),
        ("tiny-moe --data 5 --expert-slices 5", "width 144, which cannot be cut so; the nearest that works is 1"),
        ("tiny-moe --tensor 2 --expert-slices 2 --storage int4", "of 64 only; the nearest that works is 1"),
        ("tiny-moe --pipeline 7", "pipeline is 7, but the model has 6 layers"),
        ("tiny-moe --data 3 --tensor 2 --expert 3 --exchange hierarchical", "expert is 3, which does not divide by"),
    ],
)
def test_refused(
    words: str, says: str, models: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with what would work."""
    monkeypatch.setattr(launch, "Job", None)  # nothing is started
    monkeypatch.delenv("RANK", raising=False)
    capsys.readouterr()
    request = ["--prompt-ids", "1", "--max-new-tokens", "1"]
    status: object
    try:
        status = main(["generate", *(models.get(word, word) for word in words.split()), *request])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr()
    assert status == 2
    assert says in said.err
    assert not said.out
    assert said.err.splitlines()[-1].startswith("twinfer")
