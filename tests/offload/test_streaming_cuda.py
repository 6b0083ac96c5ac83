"""Records that come to a GPU by a stream of its own, while it computes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from twinfer.offload.copies import copies_for
from twinfer.offload.direct import DirectFile, aligned_buffer
from twinfer.offload.dram import Dram, spread
from twinfer.offload.form import in_buffer
from twinfer.offload.streamer import Streamer
from twinfer.oracle.models import RandomSource

from .small import built, config

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BUSY_CYCLES = 2_000_000
"""Of a GPU, about a millisecond: longer than a copy, so that what is computed lags behind what is asked for."""


def _sums(part: object) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(part):
        if isinstance(leaf, Tensor):
            yield leaf.contiguous().view(-1).view(torch.uint8).to(torch.int64).sum()


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_gpu_reads_the_records_of_the_file(slots: int, tmp_path: Path) -> None:
    """Sweep after sweep, whatever of them stays in DRAM, though the GPU reads each long after it was asked to."""
    store = built(RandomSource(config(layers=6), 1), tmp_path / "s")
    file, buffer = DirectFile(store.weights), aligned_buffer(max(record.nbytes for record in store.schedule))
    expected = []
    for record in store.schedule:
        file.read_into(buffer[: record.nbytes], record.offset, record.name)
        expected += [int(each) for each in _sums(in_buffer(record, buffer))]
    sizes = [record.nbytes for record in store.schedule]
    for room in (0, sum(sizes) // 2, sum(sizes)):
        dram = Dram(copies_for(torch.device("cuda")))
        dram.want(spread(sizes, room))
        streamer = Streamer(file, store.schedule, slots, dram)
        for _ in range(3):
            found = []
            for part in streamer.sweep():
                torch.cuda._sleep(BUSY_CYCLES)
                found += list(_sums(part))
            assert [int(each) for each in found] == expected
        streamer.close()
        dram.want(())
    file.close()
