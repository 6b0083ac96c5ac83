"""The whole path on a device with a memory of its own: what it gives is what the resident path gives, to the bit."""

from pathlib import Path

import pytest
from hypothesis import given, settings

from twinfer.offload import cutting, passes, path, streamer
from twinfer.offload.path import OffloadPath
from twinfer.offload.sequences import Away
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.oracle.strategies import drawn
from twinfer.spec.config import ModelConfig, Storage

from .small import BUDGET, built, logits, resident, same, schedule
from .stand_in import on_stand_in

cases = drawn(
    lambda pick: (
        draw_model_config(pick, context=40),
        pick.integer(0, 2**20),
        pick.choice(list(Storage)),
        pick.integer(1, 7),
        pick.choice([1, 2, 3, 4]),
        pick.choice([2, 512]),
        pick.choice([1, cutting.LEAST]),
        pick.choice([0, pick.integer(0, 1 << 18), 1 << 30]),
    )
)


@settings(max_examples=max(10, settings.default.max_examples // 4))
@given(case=cases)
def test_logits_are_those_of_the_resident_path(
    case: tuple[ModelConfig, int, Storage, int, int, int, int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """For drawn configs, storages, batches and buffers, layers that are one record or several, and any of them in DRAM."""
    model, seed, storage, batch, slots, flight, least, room = case
    source = RandomSource(model, seed)
    steps = schedule(model, batch, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "LEAST", least)
        store = built(source, tmp_path_factory.mktemp("store") / "s", storage)
        patch.setattr(path, "Streamer", lambda *given: Streamer(*given[:2], slots, *given[3:]))
        patch.setattr(passes, "call_bytes", lambda *given: BUDGET // flight)
        on_stand_in(patch)
        decoder = OffloadPath(store, model, budget=BUDGET, dram_budget=room, mode="eager")
        found = logits(decoder, steps)
        decoder.close()
    assert same(found, logits(resident(source, storage), steps))
