"""A layer that is several records: nothing of it is lost, each output is the whole layer's, and buffers are smaller."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.compiled.linear import multiplies_fast
from twinfer.compiled.moe import Mlp
from twinfer.compiled.packing import Matrix
from twinfer.compiled.weights import prepare_layer
from twinfer.offload import calls, cutting, parts, path
from twinfer.offload.building import build
from twinfer.offload.direct import DirectFile, aligned_buffer
from twinfer.offload.form import Record, in_buffer
from twinfer.offload.path import OffloadPath
from twinfer.offload.plan import plan
from twinfer.offload.store import Store, check_device, open_store
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource
from twinfer.spec.ambient import CPU
from twinfer.spec.config import Storage
from twinfer.spec.errors import CheckpointError, RequestError

from .small import BUDGET, built, logits, offloaded, resident, same, schedule
from .small import wide_config as model


@pytest.fixture(autouse=True)
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "LEAST", 1)


def _read(store: Store, record: Record) -> Any:
    file, buffer = DirectFile(store.weights), aligned_buffer(record.nbytes)
    file.read_into(buffer, record.offset, record.name)
    file.close()
    return in_buffer(record, buffer)


def test_a_store_is_for_a_type_of_device(tmp_path: Path) -> None:
    """That of a GPU has the resident path's whole matrices; on a CPU it is refused with the command for another."""
    source = RandomSource(model(), 3)
    given: dict[str, Any] = {"model": {"name": "m"}, "files": {}, "identity": 1, "report": lambda line: None}
    for device in ("cpu", "cuda"):
        build(source, tmp_path / device, Storage.INT8, **given, device=device)
    here, there = (open_store(tmp_path / device) for device in ("cpu", "cuda"))
    assert (here.device, there.device) == ("cpu", "cuda")
    whole = prepare_layer(source.layer(1), source.config.layers[1], Storage.INT8, CPU)
    assert isinstance(whole.mlp, Mlp)
    for (record,), matrix in zip(there.mlp[1], whole.mlp, strict=True):
        assert torch.equal(_read(there, record).word.view(torch.int32), matrix.word.view(torch.int32))
    with pytest.raises(CheckpointError, match=r"built for cuda; it is to run on cpu: .*build m .* --storage int8$"):
        OffloadPath(there, source.config, budget=BUDGET)
    with pytest.raises(CheckpointError, match=r"built for cpu; it is to run on cuda: .* --storage int8 --device cuda$"):
        check_device(here, torch.device("cuda"))


@pytest.mark.parametrize("storage", list(Storage))
def test_blocks_together_are_the_whole_matrices(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's blocks, put back in order, are to the bit the matrices of the layer that stays whole."""
    source = RandomSource(model(), 3)
    pieces = built(source, tmp_path / "pieces", storage)
    monkeypatch.setattr(cutting, "LEAST", 1 << 30)
    whole = built(source, tmp_path / "whole", storage)
    assert whole.mlp == (((), ()),) * 3
    ups, downs = ([_read(pieces, each) for each in part] for part in pieces.mlp[1])
    assert (len(ups), len(downs)) == ((5, 4) if multiplies_fast(torch.zeros(1)) else (1, 1))
    expected = _read(whole, whole.layers[1]).mlp
    for field in ("word", "scale_N", "scale_BGU", "min_BGU", "bias_N"):
        assert _equal(_joined(downs, field, 1), getattr(expected.down, field))
        assert _equal(_joined(ups, field, 2), getattr(expected.up, field))


def _joined(blocks: list[Matrix], field: str, of_each: int) -> torch.Tensor | None:
    """Return the blocks' parts below one another: of each the first (the gate's), then of each the second."""
    if getattr(blocks[0], field) is None:
        return None
    cut = [getattr(block, field).chunk(of_each) for block in blocks]
    return torch.cat([each[place] for place in range(of_each) for each in cut])


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def _agrees(folder: Path) -> bool:
    source = RandomSource(model(), 3)
    store = built(source, folder)
    steps = schedule(model(), 3, 3)
    decoder = offloaded(store, model())
    try:
        return same(logits(decoder, steps), logits(resident(source), steps))
    finally:
        decoder.close()


def _least(store: Store) -> int:
    """Return the smallest budget that works for three sequences of 30 tokens."""
    with pytest.raises(RequestError, match="the smallest that works is") as refused:
        plan(store, model(), budget=1000, batch=3, reserve=30, compute=torch.float32, expands=True)
    return int(str(refused.value).rsplit("is ", 1)[1].removesuffix(" bytes").replace(",", ""))


def test_the_case_that_mutants_are_tried_on_holds(tmp_path: Path) -> None:
    """Without a mutant it agrees, so what a mutant changes is the mutant's."""
    assert _agrees(tmp_path / "s")


def test_cut_layers_need_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest budget falls by at least a buffer's difference, which is most of a whole layer."""
    source = RandomSource(model(), 3)
    pieces = built(source, tmp_path / "again")
    monkeypatch.setattr(cutting, "LEAST", 1 << 30)
    whole = built(source, tmp_path / "whole")
    largest = [max(record.nbytes for record in store.schedule) for store in (pieces, whole)]
    assert largest[0] < (largest[1] / 6 if multiplies_fast(torch.zeros(1)) else largest[1])
    assert _least(whole) - _least(pieces) > largest[1] - largest[0]


def _mutants() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def reversed_blocks(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(parts, "up_block", lambda m, c, place, count: cutting.up_block(m, c, count - 1 - place, count))

    def outputs_swapped(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(parts, "down_block", lambda m, place, count: cutting.down_block(m, count - 1 - place, count))

    def ungated(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(
            parts,
            "up_block",
            lambda m, c, place, count: cutting.up_block(m, replace(c, width=2 * c.width, gated=False), place, count),
        )

    def stale_inner(patch: pytest.MonkeyPatch) -> None:
        original = cutting.Feeding.down

        def down(self: Any, *given: Any) -> None:
            self._inner = self._inner[:1] * len(self._inner)
            original(self, *given)

        patch.setattr(cutting.Feeding, "down", down)

    def norm_gone(patch: pytest.MonkeyPatch) -> None:
        """Ten records on, the next layer's first one lies where this one's did, of five buffers."""
        original = calls.Call.finish

        def late(self: Any, *given: Any) -> None:
            time.sleep(0.05)
            original(self, *given)

        patch.setattr(cutting, "owned", lambda norm: norm)
        patch.setattr(path, "Streamer", lambda file, records, slots, dram: Streamer(file, records, 5, dram))
        patch.setattr(calls.Call, "finish", late)

    return {
        "blocks of the up reversed": reversed_blocks,
        "blocks of the down reversed": outputs_swapped,
        "gate and up not side by side": ungated,
        "another block's inner numbers": stale_inner,
        "norm of a record that is gone": norm_gone,
    }


@pytest.mark.skipif(not multiplies_fast(torch.zeros(1)), reason="matrices are cut within only with AVX-512")
@pytest.mark.parametrize("mutant", list(_mutants()))
def test_mutants_of_cut_layers_are_caught(mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each changes the logits."""
    _mutants()[mutant](monkeypatch)
    assert not _agrees(tmp_path / "s")
