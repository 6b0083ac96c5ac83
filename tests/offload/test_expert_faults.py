"""Damaged, cut and older stores of mixtures, and reads of experts that fail."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from twinfer.offload import store as store_module
from twinfer.offload.store import Store, check, open_store
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import Storage
from twinfer.spec.errors import CheckpointError

from .small import built, logits, mixtures, offloaded, resident, same, steps_of

Patch = pytest.MonkeyPatch


def _flip(store: Store, place: int) -> None:
    with store.weights.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("storage", [Storage.FLOAT32, Storage.INT8])
def test_a_flipped_bit_names_layer_and_expert(storage: Storage, tmp_path: Path) -> None:
    """By the check, and by a run whose tokens choose the expert, in steps and in prompts."""
    model = mixtures(layers=2)
    store = built(RandomSource(model, 1), tmp_path / "s", storage)
    pick = random.Random(0)
    for part, name in enumerate(("up", "down")):
        expert = pick.randrange(6)
        record = store.experts[1][expert][part]
        place = record.offset + pick.choice([each for each in record.tensors() if each.nbytes]).offset
        _flip(store, place)
        said = f"layer 1, expert {expert}, {name}, .* is damaged"
        with pytest.raises(CheckpointError, match=said):
            check(store)
        for steps in (steps_of(model, 2, 0), [[torch.tensor([token])] for token in range(25)]):
            decoder = offloaded(store, model)
            with pytest.raises(CheckpointError, match=said):
                logits(decoder, steps)
            decoder.close()
        _flip(store, place)
    check(store)


def test_a_read_that_fails_is_told_and_can_be_tried_again(tmp_path: Path, monkeypatch: Patch) -> None:
    """The error names layer and expert; once the disk works again, so do new sequences."""
    model = mixtures(layers=2)
    source = RandomSource(model, 1)
    store, steps = built(source, tmp_path / "s"), steps_of(model, 2, 0)
    first = min(up.offset for up, _ in store.experts[1])
    last = max(down.offset + down.nbytes for _, down in store.experts[1])
    fails = True

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        if fails and first <= offset < last:
            raise OSError(5, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    decoder = offloaded(store, model)
    monkeypatch.setattr(decoder._file, "_read", read)
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"layer 1, expert ([0-5]), up( and .* \1, down)? cannot be read: Input/output"
        ):
            logits(decoder, steps)
    fails = False
    assert same(logits(decoder, steps), logits(resident(source), steps))
    decoder.close()


def test_truncated_and_older_stores_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    """Whether the experts' end is missing, or the store was written when layers held them."""
    store = built(RandomSource(mixtures(), 1), tmp_path / "s")
    whole = store.weights.stat().st_size
    os.truncate(store.weights, store.experts[-1][-1][1].offset)
    with pytest.raises(CheckpointError, match=f"must have {whole:,}"):
        open_store(store.folder)
    monkeypatch.setattr(store_module, "FORMAT", 4)
    with pytest.raises(CheckpointError, match=r"built for format 3; here it is 4: .* twinfer offload build m "):
        open_store(store.folder)
