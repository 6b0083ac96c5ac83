"""What the ranks of a pool are asked to do with stores, and seeded faults of that; all ranks do it together."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from twinfer.compiled.path import Mode
from twinfer.offload import cutting, gathering, kv_stream, rank_measuring, rank_path, rank_program, shares, streamer
from twinfer.offload.direct import DirectFile
from twinfer.offload.dram import Dram
from twinfer.offload.form import bytes_of, in_buffer
from twinfer.offload.rank_path import StreamedRankPath
from twinfer.offload.shares import Shares, is_shares, open_shares, whole_as_shares
from twinfer.offload.store import open_store
from twinfer.parallel.path import RankPath
from twinfer.parallel.wire import Wire
from twinfer.spec.config import ModelConfig
from twinfer.spec.errors import CheckpointError
from twinfer.spec.parallel import ParallelConfig

_of_rank, _away, _plan = Shares.of_rank, rank_path.away_layers, rank_measuring.plan_of_rank
_gather, _gathered = gathering.all_gather_flat, gathering.GatheredStreamer._gathered
_buffer, _layer = Dram.buffer, rank_program.Moving.layer
_down, _end_layer = cutting.Feeding.down, rank_program.StreamedRankProgram.end_layer


def opened(folder: str) -> Shares:
    path = Path(folder)
    return open_shares(path) if is_shares(path) else whole_as_shares(open_store(path))


def stream(
    groups: Any,
    config: ModelConfig,
    folder: str,
    calls: list[list[Tensor]],
    budget: int,
    every_position: bool = False,
    away: int = 0,
    block_tokens: int = 0,
    dram: int = 0,
    measures: bool = False,
    mutant: str | None = None,
) -> dict[str, Any]:
    """Extend one batch from a store, the keys and values of `away` layers in a file; before, measure if asked to.

    With `block_tokens` these are attended to so many tokens at a time.

    Returns the logits of each call; what this rank handed in to collectives (`counted`); what it read, as a record's
    name, the first byte and how many (`reads`); the event log, what all ranks read of experts, and what they measured.
    Or what was refused, on all ranks (`error`).
    """
    reads: list[tuple[str, int, int]] = []
    read_into = DirectFile.read_into

    def counting(self: DirectFile, buffer: memoryview, offset: int, what: str) -> None:
        reads.append((what, offset, len(buffer)))
        read_into(self, buffer, offset, what)

    def planned(*given: Any, **others: Any) -> Any:
        return replace(_plan(*given, **others), away_layers=away, block_tokens=block_tokens)

    with ExitStack() as stack:
        stack.enter_context(patch.object(DirectFile, "read_into", counting))
        stack.enter_context(patch.object(rank_measuring, "plan_of_rank", planned))
        stack.enter_context(patch.object(gathering.GatheredStreamer, "_gathered", _wiped))
        for each in MUTANTS[mutant]() if mutant else ():
            stack.enter_context(each)
        wire = Wire(groups)
        given: dict[str, Any] = {"budget": budget, "dram_budget": dram, "mode": Mode.EAGER}
        path = StreamedRankPath(opened(folder), config, wire, **given)
        measured = [path.measure(len(calls[0]), 12, tokens) for tokens in (1, 5)] if measures else []
        reads.clear()
        wire.ledger.calls.clear()
        sequences = path.open(len(calls[0]), 1)
        try:
            logits: list[Any] = [path.extend(sequences, call, every_position=every_position) for call in calls]
        except CheckpointError as error:
            return {"error": str(error)}
        events, experts = path.events, path.expert_counts()
        sequences.close()
        path.close()
    counted = [(call.kind.value, call.ranks, call.bytes) for call in wire.ledger.calls]
    shown = {"events": events, "experts": experts, "measured": measured, "plan": path.plan}
    return {"logits": logits, "counted": counted, "reads": reads, **shown}


def differing(groups: Any, resident: RankPath, folder: str) -> list[str]:
    """Return the layers whose stored tensors have other bytes than those that a rank prepares and holds."""
    store = opened(folder).of_rank(groups.parallel, groups.rank)
    file = store.weights.read_bytes()
    found = []
    for record, held in zip(store.layers, resident.share.model.layers, strict=True):
        buffer = memoryview(bytearray(file[record.offset : record.offset + record.nbytes]))
        stored, prepared = (pytree.tree_leaves(each) for each in (in_buffer(record, buffer), held))
        if [_bits(each) for each in stored] != [_bits(each) for each in prepared]:
            found.append(record.name)
    return found


def _bits(leaf: Any) -> Any:
    return (leaf.dtype, leaf.shape, bytes(bytes_of(leaf))) if isinstance(leaf, Tensor) else leaf


def _of_the_next(self: Shares, parallel: ParallelConfig, rank: int) -> Any:
    return _of_rank(self, parallel, (rank + 1) % parallel.ranks)


def _gathered_backwards(all_N: Tensor, given_N: Tensor, group: Any, async_op: bool = False) -> Any:
    work = _gather(all_N, given_N, group)
    if all_N.dtype is torch.uint8:
        all_N.copy_(torch.cat(all_N.chunk(dist.get_world_size(group))[::-1]))
    return work


def _first_layers(layers: int, stages: int) -> Any:
    return [range(layers // stages)] * stages


def _wiped(self: gathering.GatheredStreamer, *given: Any, **how: Any) -> Any:
    """Gather a record once nothing of the one before it is left."""
    torch.frombuffer(self._buffer, dtype=torch.uint8).zero_()
    return _gathered(self, *given, **how)


def _another(self: Dram, index: int, nbytes: int) -> memoryview:
    return _buffer(self, index // 2, nbytes)


def _down_reversed(self: cutting.Feeding) -> Tensor:
    return torch.cat(self._out[::-1], 1)


def _stale_inner(self: cutting.Feeding, block: Any) -> None:
    self._inner = self._inner[:1] * len(self._inner)
    _down(self, block)


def _end(self: rank_program.StreamedRankProgram, index: int, feeding: Any, norm: Any, tokens: Any) -> Tensor:
    feeding.half = feeding.half._replace(out_TM=None)
    return _end_layer(self, index, feeding, norm, tokens)


def _end_late(self: rank_program.StreamedRankProgram, index: int, feeding: Any, norm: Any, tokens: Any) -> Tensor:
    late_TM = feeding.half.out_TM
    return _end(self, index, feeding, norm, tokens) + late_TM


def _end_alone(self: rank_program.StreamedRankProgram, index: int, feeding: Any, norm: Any, tokens: Any) -> Tensor:
    self.reduced(torch.zeros_like(feeding.half.x_TM), tokens)
    with patch.object(rank_program.StreamedRankProgram, "reduced", lambda self, part_TM, tokens: part_TM):
        return _end_layer(self, index, feeding, norm, tokens)


def _exchanged(self: rank_program.Moving, *given: Any) -> None:
    rows = [each.row for each in self.spans]
    self.spans = [each._replace(row=row) for each, row in zip(self.spans, rows[::-1], strict=True)]
    _layer(self, *given)


def _ends(end: Callable[..., Tensor]) -> list[Any]:
    return [patch.object(rank_program.StreamedRankProgram, "end_layer", end)]


MUTANTS: dict[str, Callable[[], list[Any]]] = {
    "records of another rank": lambda: [patch.object(Shares, "of_rank", _of_the_next)],
    "gathered backwards": lambda: [patch.object(gathering, "all_gather_flat", _gathered_backwards)],
    "gathered backwards, unverified": lambda: [
        patch.object(gathering, "all_gather_flat", _gathered_backwards),
        patch.object(gathering, "faulty", lambda record, buffer: None),
    ],
    "the first stage's layers": lambda: [patch.object(shares, "stage_layers", _first_layers)],
    "keys and values not written": lambda: [patch.object(kv_stream.KvStream, "_write", lambda self, layer: None)],
    "copied from another record's memory": lambda: [
        patch.object(Dram, "buffer", _another),
        patch.object(streamer._Reading, "_verify", lambda self, piece: None),
    ],
    "blocks of the down reversed": lambda: [patch.object(cutting.Feeding, "out_TM", _down_reversed)],
    "inner numbers of another block": lambda: [patch.object(cutting.Feeding, "down", _stale_inner)],
    "attention left out": lambda: _ends(_end),
    "attention added on after the sum": lambda: _ends(_end_late),
    "the MLP's part not added up": lambda: _ends(_end_alone),
    "norm of a record that is gone": lambda: [patch.object(cutting, "owned", lambda norm: norm)],
    "sequences' keys and values exchanged": lambda: [
        patch.object(rank_program.Moving, "layer", _exchanged),
    ],
    "both move the same layers": lambda: [
        patch.object(rank_path, "away_layers", lambda layers, count, rank: _away(layers, count, 0))
    ],
}
