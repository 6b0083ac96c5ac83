"""Records read ahead of their use, in the order of a schedule that is gone through again and again.

While one record is computed with, the next ones are read into the other buffers of a fixed ring, by a few threads that
share each record in pieces: several requests at a time are what a disk needs to be read at its full speed. After the
schedule's last record come the first ones again, so the disk does not rest between steps either. The memory is that of
the ring, whatever the model's size.

All threads read while the computation waits for records. Once it finds them there a single thread reads: computing is
slower beside several, which take turns with it for the interpreter and for a core.

What DRAM keeps (`dram`) is copied into the ring instead, by the same threads. How bytes get there depends on the device
(`copies`).

Each record's checksums are verified when it is first read; a read that failed is raised where its record is next.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Hashable, Sequence
from typing import Any, NamedTuple

from ..spec.errors import CheckpointError, MachineError, RequestError
from .copies import Inline
from .direct import DirectFile
from .dram import Dram, Source
from .events import Event, Kind
from .form import Record, faulty, in_buffer
from .ring import Ring

PIECE = 4 << 20
"""Bytes of a read: long enough for a disk's full speed, short enough for the threads to share a record."""

WORKERS = 3

KEPT = 1 << 14
"""Events kept; the oldest go."""


class _Piece(NamedTuple):
    ticket: int
    record: int
    begin: int
    end: int


class _Reading:
    """What the threads share. It does not know the streamer, so that this can be forgotten and end them."""

    def __init__(self, file: DirectFile, records: Sequence[Record], slots: int, piece: int, dram: Dram) -> None:
        self.file, self.records, self.piece = file, records, piece
        self.dram, self.copies = dram, dram.copies
        self.ring = Ring(slots)
        size = max(record.nbytes for record in records)
        self.buffers = [self.copies.device_buffer(size) for _ in range(slots)]
        self.staging = [self.copies.host_buffer(size) for _ in range(slots if self.copies.staged else 0)]
        self.sources: dict[int, Source] = {}
        """For each ticket that is being read, where its bytes come from."""
        lock = threading.RLock()
        self.changed, self.asked = threading.Condition(lock), threading.Condition(lock)
        """Whoever computes waits for the first, the threads for the second."""
        self.pieces: deque[_Piece] = deque()
        self.left: dict[int, int] = {}
        """For each ticket that is being read, the pieces that are not there yet."""
        self.failures: dict[int, Exception] = {}
        self.verified: set[int] = set()
        self.busy = 0
        """Threads that have a piece."""
        self.late = True
        """Whether the record that was asked for last was not there."""
        self.events: deque[Event] = deque(maxlen=KEPT)
        self.dropping = False
        """Whether pieces that are asked for are not read: a sweep was left."""
        self.closed = False

    def claim(self) -> None:
        """Ask for the records that have free buffers. The lock is held."""
        while (ticket := self.ring.claim()) is not None:
            index = ticket % len(self.records)
            nbytes = self.records[index].nbytes
            source = self.sources[ticket] = self.dram.tier.source(index)
            if source is Source.FILL:
                self.dram.buffer(index, nbytes)
            begins = range(0, nbytes, nbytes if source is Source.COPY else self.piece)
            self.left[ticket] = len(begins)
            self.pieces += [_Piece(ticket, index, begin, min(begin + self.piece, nbytes)) for begin in begins]
        self.ask()

    def ask(self) -> None:
        """Wake the threads that may read now. The lock is held."""
        if self.late:
            self.asked.notify_all()
        elif self.pieces and self.busy == 0:
            self.asked.notify()

    def work(self) -> None:
        """Read pieces until closed: a thread's life."""
        while True:
            with self.changed:
                while not self.closed and not (self.pieces and (self.busy == 0 or self.late)):
                    self.asked.wait()
                if self.closed:
                    return
                piece = self.pieces.popleft()
                self.busy += 1
            self._fill(piece)
            with self.changed:
                self.busy -= 1

    def _fill(self, piece: _Piece) -> None:
        """Read a piece; with the last one of its record that is brought into its slot."""
        failure = None if self.dropping else self._read(piece)
        with self.changed:
            if failure is not None:
                self.failures.setdefault(piece.ticket, failure)
            self.left[piece.ticket] -= 1
            if self.left[piece.ticket] > 0:
                return
        self._end(piece)

    def _read(self, piece: _Piece) -> Exception | None:
        record, slot = self.records[piece.record], self.ring.slot(piece.ticket)
        if self.sources[piece.ticket] is Source.COPY:
            return None
        begin_s = time.perf_counter()
        try:
            self.copies.settle(slot)
            self.file.read_into(self._host(piece)[piece.begin : piece.end], record.offset + piece.begin, record.name)
        except Exception as error:
            return error
        self.events.append(Event(Kind.READ, piece.record, slot, begin_s, time.perf_counter()))
        return None

    def _host(self, piece: _Piece) -> memoryview:
        """Return the memory that the record is read into, or lies in."""
        record, slot = self.records[piece.record], self.ring.slot(piece.ticket)
        if self.sources[piece.ticket] is not Source.DISK:
            return self.dram.buffer(piece.record, record.nbytes)
        buffer = self.staging[slot] if self.staging else self.buffers[slot]
        assert isinstance(buffer, memoryview)
        return buffer

    def _end(self, piece: _Piece) -> None:
        """Bring a record into its slot, all of whose bytes were read, unless that failed."""
        source, slot, tier = self.sources[piece.ticket], self.ring.slot(piece.ticket), self.dram.tier
        whole = not self.dropping and piece.ticket not in self.failures
        if whole:
            try:
                self._place(piece, source, slot)
            except Exception as error:  # whatever it is: who waits for the record is told, and waits no more
                self.failures[piece.ticket], whole = error, False
        if source is Source.FILL:
            with self.changed:
                (tier.filled if whole else tier.failed)(piece.record)
        with self.changed:
            del self.left[piece.ticket], self.sources[piece.ticket]
            self.ring.filled(piece.ticket)
            self.changed.notify_all()
        if source is Source.COPY or (source is Source.FILL and whole):
            self.copies.settle(slot)
            with self.changed:
                tier.copied(piece.record)

    def _place(self, piece: _Piece, source: Source, slot: int) -> None:
        """Verify a record the first time, and copy it into its slot where it was not read into it."""
        if piece.record not in self.verified:
            self._verify(piece)
        if source is not Source.DISK or self.staging:
            begin_s, record = time.perf_counter(), self.records[piece.record]
            self.copies.copy(slot, self.buffers[slot], self._host(piece)[: record.nbytes])
            self.events.append(Event(Kind.COPY, piece.record, slot, begin_s, time.perf_counter()))

    def _verify(self, piece: _Piece) -> None:
        """Raise `CheckpointError` for a record that is not what was written."""
        record = self.records[piece.record]
        if fault := faulty(record, self._host(piece)):
            raise damaged(self.file, record, fault)
        self.verified.add(piece.record)

    def read_now(self, index: int, slot: int) -> None:
        """Read a record into a slot while nothing else is read."""
        record, buffer = self.records[index], self.buffers[slot]
        self.copies.settle(slot)
        host = self.staging[slot] if self.staging else buffer
        assert isinstance(host, memoryview)
        self.file.read_into(host[: record.nbytes], record.offset, record.name)
        if self.staging:
            self.copies.leave(slot)
            self.copies.copy(slot, buffer, host[: record.nbytes])
            self.copies.arrive(slot)

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            self.asked.notify_all()


def damaged(file: DirectFile, record: Record, tensor: str) -> CheckpointError:
    """Return the error of a tensor whose bytes are not those that were written."""
    return CheckpointError(
        f"{file.path}: {record.name}, {tensor} is damaged, its checksum is another; build the store again"
    )


class Streamer:
    """Goes through the records of a file in order, again and again, with `slots` of them in memory.

    Reading begins at once. One sweep at a time; `close` ends the threads. `dram` outlives it.
    """

    def __init__(
        self,
        file: DirectFile,
        records: Sequence[Record],
        slots: int,
        dram: Dram | None = None,
        *,
        workers: int = WORKERS,
        piece: int = PIECE,
    ) -> None:
        self._reading = reading = _Reading(file, records, slots, piece, dram or Dram(Inline()))
        self._parts: dict[tuple[int, int], Any] = {}
        self._process = os.getpid()
        self.slots = slots
        self._threads = [threading.Thread(target=reading.work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        self._end = weakref.finalize(self, reading.close)
        with reading.changed:
            reading.claim()

    @property
    def events(self) -> list[Event]:
        """The newest events, reads in the order in which they ended."""
        return list(self._reading.events)

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return sum(map(len, self._reading.buffers))

    def sweep(self) -> Generator[Any, None, None]:
        """Yield each record's part once, in order; a part is gone as soon as the next is asked for.

        Raises `CheckpointError` where a record cannot be read or is damaged. A sweep that is not gone through to its
        end is begun anew by the next one.
        """
        self.check_process()
        reading, complete = self._reading, False
        try:
            for index in range(len(reading.records)):
                ticket = self._wait(index)
                slot = reading.ring.slot(ticket)
                begin_s = time.perf_counter()
                yield self._part(index, slot)
                reading.events.append(Event(Kind.USE, index, slot, begin_s, time.perf_counter()))
                reading.copies.leave(slot)
                with reading.changed:
                    reading.ring.release(ticket)
                    reading.claim()
            complete = True
        finally:
            if not complete:
                self._restart()

    def still_sweep(self, kinds: Sequence[Hashable]) -> Generator[Any, None, None]:
        """Yield for each record the part of one of its kind, which is read only where no buffer holds one.

        For measuring what computing takes; reads are logged as waits.
        """
        self._wait_for_reads()
        held: dict[Hashable, tuple[int, int]] = {}
        try:
            for index, kind in enumerate(kinds):
                if kind not in held:
                    slot = len(held) if len(held) < self.slots else held.pop(next(iter(held)))[1]
                    begin_s = time.perf_counter()
                    self._reading.read_now(index, slot)
                    held[kind] = index, slot
                    self._reading.events.append(Event(Kind.WAIT, index, slot, begin_s, time.perf_counter()))
                begin_s = time.perf_counter()
                yield self._part(*held[kind])
                self._reading.copies.drain()
                self._reading.events.append(Event(Kind.USE, index, held[kind][1], begin_s, time.perf_counter()))
        finally:
            self._restart()

    def check_process(self) -> None:
        """Raise `MachineError` in a forked process, which lacks the threads."""
        if os.getpid() != self._process:
            raise MachineError(
                "this process was forked after the store was opened, and a fork does not copy the threads that read; "
                "open the store in the forked process, or start that by spawn"
            )

    def close(self) -> None:
        """End the threads; closing twice does nothing."""
        self._end()
        if os.getpid() == self._process:
            for thread in self._threads:
                thread.join()
            reading = self._reading
            reading.copies.finish()
            while reading.staging:
                reading.copies.free(reading.staging.pop())

    def _wait(self, index: int) -> int:
        """Return the ticket of the next record once its bytes are there."""
        reading, begin_s = self._reading, time.perf_counter()
        with reading.changed:
            ticket = reading.ring.take()
            reading.late = ticket is None
            reading.ask()
            while ticket is None:
                if reading.closed:
                    raise RequestError("the store is closed; open it again")
                reading.changed.wait()
                ticket = reading.ring.take()
            failure = reading.failures.pop(ticket, None)
        assert ticket % len(reading.records) == index
        reading.events.append(Event(Kind.WAIT, index, reading.ring.slot(ticket), begin_s, time.perf_counter()))
        if failure is not None:
            raise failure
        reading.copies.arrive(reading.ring.slot(ticket))
        return ticket

    def _part(self, index: int, slot: int) -> Any:
        part = self._parts.get((index, slot))
        if part is None:
            part = self._parts[index, slot] = in_buffer(self._reading.records[index], self._reading.buffers[slot])
        return part

    def _restart(self) -> None:
        """Wait for the reads under way, forget what was read, and begin with the first record."""
        self._wait_for_reads()
        reading = self._reading
        with reading.changed:
            if not reading.closed:
                for slot in range(self.slots):  # what was computed may still be read by the device
                    reading.copies.leave(slot)
                reading.failures.clear()
                reading.ring.reset()
                reading.claim()

    def _wait_for_reads(self) -> None:
        """Wait until nothing is being read; what was not begun is not read."""
        reading = self._reading
        with reading.changed:
            reading.dropping = True
            while reading.left and not reading.closed:
                reading.changed.wait()
            reading.dropping = False
