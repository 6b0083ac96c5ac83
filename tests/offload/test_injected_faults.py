"""Reads that fail, end early or bring damaged bytes, at every kind of record; and a store that is removed."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from twinfer.offload import cutting, path
from twinfer.offload.form import Record
from twinfer.offload.store import Store
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource
from twinfer.spec.config import ModelConfig
from twinfer.spec.errors import CheckpointError

from .small import built, config, logits, mixtures, offloaded, resident, same, schedule

Patch = pytest.MonkeyPatch


class Kept(NamedTuple):
    """A store, and the logits that its model gives."""

    store: Store
    model: ModelConfig
    steps: list[list[Tensor]]
    expected: list[Tensor]


def _dense() -> ModelConfig:
    """Return layers whose MLP has records of its own."""
    small = config(layers=3)
    layer = small.layers[0]
    attention = replace(layer.attention, heads=4, kv_heads=4, head_size=16)
    layer = replace(layer, attention=attention, mlp=replace(layer.mlp, width=640))
    return replace(small, hidden=64, layers=(layer,) * 3)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    made = {}
    for name, model in (("dense", _dense()), ("mixture", mixtures())):
        source = RandomSource(model, 3)
        with Patch.context() as patch:
            patch.setattr(cutting, "LEAST", 1)
            store = built(source, tmp_path_factory.mktemp(name) / "s")
        steps = schedule(model, 3, 3)
        made[name] = Kept(store, model, steps, logits(resident(source), steps))
    return made


KINDS: dict[str, tuple[str, Callable[[Store], Sequence[Record]]]] = {
    "attention": ("dense", lambda store: store.layers[1:2]),
    "block of the up": ("dense", lambda store: store.mlp[1][0][-1:]),
    "block of the down": ("dense", lambda store: store.mlp[1][1][-1:]),
    "block of the head": ("dense", lambda store: store.head[-1:]),
    "table": ("dense", lambda store: store.table),
    "layer of a mixture": ("mixture", lambda store: store.layers[2:3]),
    "experts' ups": ("mixture", lambda store: [up for up, _ in store.experts[2]]),
    "experts' downs": ("mixture", lambda store: [down for _, down in store.experts[2]]),
}


def _fails(descriptor: int, buffers: list[memoryview], offset: int, bad: range) -> int:
    raise OSError(5, "Input/output error")


def _ends(descriptor: int, buffers: list[memoryview], offset: int, bad: range) -> int:
    return 0


def _flips(descriptor: int, buffers: list[memoryview], offset: int, bad: range) -> int:
    count = os.preadv(descriptor, buffers, offset)
    part = buffers[0][max(0, bad.start - offset) : bad.stop - offset]
    torch.frombuffer(part, dtype=torch.uint8).bitwise_xor_(1)  # type: ignore[call-overload]
    return count


FAULTS = {
    "fails": (_fails, r"{}( and [\w ,]+)? cannot be read: Input/output error"),
    "ends early": (_ends, r"{}( and [\w ,]+)? ends early, 0 of its \d+ bytes are there"),
    "flipped bits": (_flips, r"{}, [\w .]+ is damaged, its checksum is another"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_read_that_goes_wrong_is_named_and_the_step_can_be_asked_for_again(
    kind: str, fault: str, kept: dict[str, Kept], monkeypatch: Patch
) -> None:
    """In prompts, and in a step of three sequences: the same sequences then give what they would have given.

    One buffer, so that only the first record is read ahead. What a step needs of experts may be there from the prompt.
    """
    name, records_of = KINDS[kind]
    store, model, steps, expected = kept[name]
    bad = {record.name: range(record.offset, record.offset + record.nbytes) for record in records_of(store)}
    wrong, message = FAULTS[fault]
    failing = False

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        end = offset + len(buffers[0])
        there = [within for within in bad.values() if failing and offset < within.stop and within.start < end]
        return wrong(descriptor, buffers, offset, there[0]) if there else os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(path, "Streamer", lambda *given: Streamer(*given[:2], 1, *given[3:]))
    decoder = offloaded(store, model)
    monkeypatch.setattr(decoder._file, "_read", read)
    sequences = decoder.open(3, 30)
    found = []
    for number, step in enumerate(steps):
        again = number == 1 and fault != "flipped bits" and "experts" not in kind  # a record is verified once
        failing = number == 0 or again
        if failing:
            with pytest.raises(CheckpointError, match=message.format(f"({'|'.join(map(re.escape, bad))})")):
                decoder.extend(sequences, step)
            failing = False
        found.append(decoder.extend(sequences, step))
    decoder.close()
    assert same(found, expected)


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_a_removed_store_is_run_on(name: str, kept: dict[str, Kept], tmp_path: Path) -> None:
    """Its open file lives on: the sequences, and others that are opened later, give the same logits."""
    there, model, steps, expected = kept[name]
    store = replace(there, folder=tmp_path / "s")
    shutil.copytree(there.folder, store.folder)
    decoder = offloaded(store, model)
    sequences = decoder.open(3, 30)
    found = [decoder.extend(sequences, steps[0])]
    shutil.rmtree(store.folder)
    found += [decoder.extend(sequences, step) for step in steps[1:]]
    assert same(found, expected)
    assert same(logits(decoder, steps), expected)
    decoder.close()
