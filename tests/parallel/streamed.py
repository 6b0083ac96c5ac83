"""What the ranks of a pool are asked to do with stores; each function runs on all ranks with equal arguments."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from twinfer.compiled.path import Mode
from twinfer.offload.direct import DirectFile
from twinfer.offload.rank_path import StreamedRankPath
from twinfer.offload.shares import Shares, is_shares, open_shares, whole_as_shares
from twinfer.offload.store import open_store
from twinfer.parallel.wire import Wire
from twinfer.spec.config import ModelConfig


def opened(folder: str) -> Shares:
    path = Path(folder)
    return open_shares(path) if is_shares(path) else whole_as_shares(open_store(path))


def stream(
    groups: Any, config: ModelConfig, folder: str, calls: list[list[Tensor]], budget: int, every_position: bool = False
) -> dict[str, Any]:
    """Extend one batch from a store.

    Returns the logits of each call; what this rank handed in to collectives (`counted`); what it read, as a record's
    name, the first byte and how many (`reads`); and the event log.
    """
    reads: list[tuple[str, int, int]] = []
    read_into = DirectFile.read_into

    def counting(self: DirectFile, buffer: memoryview, offset: int, what: str) -> None:
        reads.append((what, offset, len(buffer)))
        read_into(self, buffer, offset, what)

    with patch.object(DirectFile, "read_into", counting):
        wire = Wire(groups)
        path = StreamedRankPath(opened(folder), config, wire, budget=budget, mode=Mode.EAGER)
        sequences = path.open(len(calls[0]), 1)
        logits: list[Any] = [path.extend(sequences, call, every_position=every_position) for call in calls]
        events = path.events
        sequences.close()
        path.close()
    counted = [(call.kind.value, call.ranks, call.bytes) for call in wire.ledger.calls]
    return {"logits": logits, "counted": counted, "reads": reads, "events": events}
