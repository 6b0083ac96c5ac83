"""Records that N ranks read together: each an N-th of every record, of which all then have the whole.

Ranks that hold the same weights, and read from one disk or from disks of their own, bring in a record N times as fast
as one of them (the paper's section VI-B; `reference.offload.partitioned` is the same for one process). Parts are of
bytes, not of rows: a record of P pages is cut into parts of ceil(P / N) pages, of which the last ones may be short.

    5 pages, 2 ranks: rank 0 reads pages 0 to 2, rank 1 pages 3 and 4

Parts are read ahead into a ring; a record is gathered when it is next, into one buffer beside the ring, and verified
there when it is first whole. Nothing is gathered ahead. A rank whose part is empty reads the last page, for nobody.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ..parallel.groups import PATIENCE, Group, Groups
from ..parallel.wire import Pending, Wire, all_gather_flat
from ..spec.parallel import ParallelConfig
from .direct import DirectFile, aligned_buffer
from .dram import Dram
from .events import Event
from .form import PAGE, Placed, Record, faulty, in_buffer
from .streamer import Streamer, damaged


def readers_of(parallel: ParallelConfig, rank: int) -> list[int]:
    """Return the ranks that hold what this rank holds, itself among them.

    >>> readers_of(ParallelConfig(data=2, tensor=2), 1), readers_of(ParallelConfig(data=2, expert=2), 1)
    ([1, 3], [1])
    """

    def held(rank: int) -> tuple[int, ...]:
        place = parallel.place(rank)
        return place.stage, place.tensor, place.expert, place.expert_slice

    return [other for other in range(parallel.ranks) if held(other) == held(rank)]


def form_readers(groups: Groups) -> Group:
    """Form the groups of ranks that hold the same, and return this rank's; every rank of a job calls this."""
    parallel, rank = groups.parallel, groups.rank
    found = Group((rank,), 0, None)
    for ranks in dict.fromkeys(tuple(readers_of(parallel, each)) for each in range(parallel.ranks)):
        made = None if len(ranks) == 1 else dist.new_group(list(ranks), timeout=PATIENCE)
        if made is not None and rank in ranks:
            found = Group(ranks, ranks.index(rank), made)
    return found


@dataclass(frozen=True, slots=True)
class Part(Record):
    """The pages of a record that one of its readers reads, as one tensor of bytes. Checksums are of whole records."""

    def tensors(self) -> list[Placed]:
        return []


def part_of(record: Record, readers: int, reader: int) -> Part:
    """Return what one of several readers reads.

    >>> record = Record("layer 0", 8 * PAGE, 5 * PAGE, None)
    >>> [(part.offset // PAGE, part.nbytes // PAGE) for part in (part_of(record, 2, reader) for reader in range(2))]
    [(8, 3), (11, 2)]
    """
    count = record.nbytes // PAGE
    each = -(-count // readers)
    first = min(reader * each, count - 1)
    nbytes = (max(first + 1, min(count, (reader + 1) * each)) - first) * PAGE
    form = {"name": "bytes", "dtype": "uint8", "shape": [nbytes], "offset": 0, "crc32": 0}
    return Part(record.name, record.offset + first * PAGE, nbytes, form)


class GatheredStreamer:
    """Goes through the records of a file as `Streamer` does, together with the same object on every other reader."""

    def __init__(
        self, file: DirectFile, records: Sequence[Record], slots: int, dram: Dram, readers: Group, wire: Wire
    ) -> None:
        self._file, self._records, self._readers, self._wire = file, records, readers, wire
        self._parts = Streamer(file, [part_of(each, len(readers), readers.place) for each in records], slots, dram)
        self._each = [-(-record.nbytes // PAGE // len(readers)) * PAGE for record in records]
        self._buffer = aligned_buffer(max(self._each) * len(readers))
        self._whole: dict[int, Any] = {}
        self._verified: set[int] = set()
        self.slots = slots

    @property
    def events(self) -> list[Event]:
        """The newest events; reads are of this rank's parts."""
        return self._parts.events

    def sweep(self) -> Iterator[Any]:
        """Yield each record's part of the model once, in order; it is gone as soon as the next is asked for."""
        for index, own_N in enumerate(self._parts.sweep()):
            yield self._gathered(index, own_N)

    def still_sweep(self, kinds: Sequence[Hashable]) -> Iterator[Any]:
        """Yield for each record the part of one of its kind, gathered each time; see `Streamer.still_sweep`."""
        for index, own_N in enumerate(self._parts.still_sweep(kinds)):
            yield self._gathered(index, own_N, verifies=False)

    def close(self) -> None:
        self._parts.close()

    def _gathered(self, index: int, own_N: Tensor, *, verifies: bool = True) -> Any:
        record, each = self._records[index], self._each[index]
        all_N = torch.frombuffer(self._buffer, dtype=torch.uint8)[: each * len(self._readers)]
        given_N = own_N if len(own_N) == each else functional.pad(own_N, (0, each - len(own_N)))
        work = all_gather_flat(all_N, given_N, self._readers.process_group, async_op=True)
        self._wire.waited(Pending(all_N, work, given_N))
        if verifies and index not in self._verified:
            if fault := faulty(record, self._buffer):
                raise damaged(self._file, record, fault)
            self._verified.add(index)
        if index not in self._whole:
            self._whole[index] = in_buffer(record, self._buffer)
        return self._whole[index]
