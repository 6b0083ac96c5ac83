"""Models whose weights, experts, keys and values pass through a GPU's memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twinfer.compiled.path import CompiledPath
from twinfer.offload import path
from twinfer.offload.building import build
from twinfer.offload.path import OffloadPath
from twinfer.offload.sequences import Away
from twinfer.offload.store import Store, open_store
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import draw_schedule
from twinfer.spec.config import ModelConfig, Storage

from .small import BUDGET, config, logits, mixtures, same, schedule

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SMALL_HEAD = 64
"""A vocabulary whose head is one block, so that all products have the sizes that they have resident."""


def _built(source: RandomSource, folder: Path, storage: Storage) -> Store:
    given = {"model": {"name": "m"}, "files": {}, "identity": 1, "report": lambda line: None}
    build(source, folder, storage, **given, device="cuda")
    return open_store(folder)


@pytest.mark.parametrize("storage", list(Storage))
@pytest.mark.parametrize("model", [config(), mixtures()], ids=["dense", "experts"])
@pytest.mark.parametrize("blocks", [0, 128])
def test_a_store_on_a_gpu_is_within_the_budget_of_errors(
    model: ModelConfig, storage: Storage, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With records, experts, keys and values in DRAM, on the disk and on the GPU, layers whole and block by block."""
    source = RandomSource(model, 3)
    store = _built(source, tmp_path / "s", storage)
    monkeypatch.setattr(path.OffloadPath, "_away", lambda self, plan: Away((0, 1, 3), blocks, (1,)))
    decoder = OffloadPath(store, model, device="cuda", budget=BUDGET, dram_budget=store.nbytes // 3, mode="eager")
    try:
        assert_paths_agree(Baseline.of(source, storage=storage), decoder, draw_schedule(RandomPicker(5), model))
    finally:
        decoder.close()


CASES = [(model, storage, "eager") for model in (config(), mixtures()) for storage in Storage]
CASES.append((config(), Storage.INT8, "compiled"))


@pytest.mark.parametrize(("model", "storage", "mode"), CASES)
def test_logits_are_those_of_the_resident_path_on_the_gpu(
    model: ModelConfig, storage: Storage, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, where the head is one block; whatever of keys and values is away."""
    model = replace(model, vocabulary=SMALL_HEAD)
    source = RandomSource(model, 3)
    store = _built(source, tmp_path / "s", storage)
    monkeypatch.setattr(path.OffloadPath, "_away", lambda self, plan: Away((0, 1, 3), 0, (1,)))
    steps = schedule(model, 3, 1)
    decoder = OffloadPath(store, model, device="cuda", budget=BUDGET, dram_budget=store.nbytes // 3, mode=mode)
    expected = logits(CompiledPath(source, storage=storage, device="cuda", mode=mode, captured=False), steps)
    for _ in range(3):
        assert same(logits(decoder, steps), expected)
    decoder.close()
