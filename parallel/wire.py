"""Collectives between processes, counted in a ledger at each call.

Why it is faster than it looks: sums are made in place, in the memory of the product that they complete, and those that
the next step does not need yet are only started (`start_all_reduce`). What it relies on: every rank of a group issues
the same calls in the same order, whatever its caches, timing or compiler do; gloo's and NCCL's rings add up each piece
of a sum on one rank and hand it to all, and shared sums are added in one order, so that all ranks have the same bits.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Work

from .groups import Group, Groups
from .ledger import Call, Collective, Ledger
from .shared_sums import SharedSum

all_gather_flat: Callable[..., Work] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Gathers flat tensors of one size; by the newer name, where torch has it."""


class Pending:
    """A result that is on its way."""

    def __init__(
        self, value: Tensor, work: Work | SharedSum | None, kept: Tensor | None = None, *, call: Call | None = None
    ) -> None:
        self.call = call
        """As what it is counted."""
        self._value, self._work, self._kept = value, work, kept

    @property
    def in_flight(self) -> bool:
        return self._work is not None and not self._work.is_completed()

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        self._work = self._kept = None
        return self._value


class Wire:
    """One rank's end of all collectives. `on_wait` is called with True before a wait for other ranks, with False after.

    While it is muted nothing is sent: what is returned has the right shape and no meaning. So ranks can compile one
    after the other.
    """

    def __init__(
        self,
        groups: Groups,
        on_wait: Callable[[bool], None] = lambda waiting: None,
        *,
        keeps_calls: bool = True,
    ) -> None:
        self.groups = groups
        self.ledger = Ledger(keeps_calls)
        self._on_wait = on_wait
        self._muted = False
        self._sent: list[Pending] = []

    @property
    def is_muted(self) -> bool:
        return self._muted

    @contextmanager
    def muted(self) -> Iterator[None]:
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def all_reduce(self, x: Tensor, group: Group) -> Tensor:
        """Return the sum over the group, in x's own memory."""
        return self.waited(self.start_all_reduce(x, group))

    def start_all_reduce(self, x: Tensor, group: Group) -> Pending:
        """Begin to add up; x belongs to the collective until it is waited for."""
        if len(group) == 1 or self._muted:
            return Pending(x, None)
        assert x.is_contiguous(), "gloo would add up what lies between the rows"
        call = self.ledger.call(Collective.ALL_REDUCE, group.ranks, x.nbytes)
        if group.sums is not None and x.nbytes <= group.sums.most_bytes:
            return Pending(x, group.sums.start(x), call=call)
        return Pending(x, dist.all_reduce(x, group=group.process_group, async_op=True), call=call)

    def largest(self, x: Tensor, group: Group) -> Tensor:
        """Return the elementwise maximum over the group; it is not counted: weights are read by it."""
        if len(group) > 1:
            self.waited(Pending(x, dist.all_reduce(x, dist.ReduceOp.MAX, group.process_group, async_op=True)))
        return x

    def all_gather(self, part_RV: Tensor, group: Group, counted: int) -> Tensor:
        """Return what all ranks hand in side by side, [R, V]; all parts are equally wide, `counted` bytes are payload.

        Two ranks with one row each: [[1, 2]] and [[3, 4]] become [[1, 2, 3, 4]].
        """
        if len(group) == 1:
            return part_RV
        rows, width = part_RV.shape
        if self._muted:
            return part_RV.repeat(1, len(group))
        call = self.ledger.call(Collective.ALL_GATHER, group.ranks, counted)
        all_GRV = part_RV.new_empty(len(group), rows, width)
        given = part_RV.contiguous()
        work = all_gather_flat(all_GRV.view(-1, width), given, group.process_group, async_op=True)
        self.waited(Pending(all_GRV, work, given, call=call))
        return all_GRV.transpose(0, 1).reshape(rows, -1)

    def all_gather_rows(self, rows: Tensor, lengths: Sequence[int], group: Group) -> Tensor:
        """Return the rows of all ranks after each other; `lengths` says how many each has.

        On the wire all are filled up to the longest.
        """
        if len(group) == 1:
            return rows
        if self._muted:
            return rows.new_zeros(sum(lengths), *rows.shape[1:])
        call = self.ledger.call(Collective.ALL_GATHER, group.ranks, rows.nbytes)
        longest = max(lengths)
        given = rows.new_zeros(longest, *rows.shape[1:])
        given[: len(rows)] = rows
        all_GN = rows.new_empty(len(group) * longest, *rows.shape[1:])
        work = all_gather_flat(all_GN, given, group.process_group, async_op=True)
        self.waited(Pending(all_GN, work, given, call=call))
        return torch.cat([all_GN[place * longest :][:length] for place, length in enumerate(lengths)])

    def all_to_all(self, rows: Tensor, sent: Sequence[int], arriving: Sequence[int], group: Group) -> Tensor:
        """Send so many rows to each rank of the group, and return those that arrive from each, after each other."""
        if len(group) == 1:
            return rows
        if self._muted:
            return rows.new_zeros(sum(arriving), *rows.shape[1:])
        call = self.ledger.call(Collective.ALL_TO_ALL, group.ranks, rows.nbytes)
        got, given = rows.new_empty(sum(arriving), *rows.shape[1:]), rows.contiguous()
        work = dist.all_to_all_single(got, given, list(arriving), list(sent), group.process_group, async_op=True)
        return self.waited(Pending(got, work, given, call=call))

    def all_numbers(self, numbers: Sequence[int], group: Group) -> list[list[int]]:
        """Return the numbers of all ranks; they are not counted."""
        own = torch.tensor(numbers)
        all_GN = own.new_empty(len(group), len(numbers))
        self.waited(Pending(all_GN, all_gather_flat(all_GN.view(-1), own, group.process_group, async_op=True)))
        table: list[list[int]] = all_GN.tolist()
        return table

    def send(self, x: Tensor, target: int) -> None:
        """Begin to send x, which must not be written to."""
        if self._muted:
            return
        x = x.contiguous()
        self.ledger.call(Collective.SEND, (self.groups.rank, target), x.nbytes)
        self._sent = [each for each in self._sent if each.in_flight]
        self._sent.append(Pending(x, dist.isend(x, target)))

    def receive(self, x_TM: Tensor, rows: int, source: int) -> Tensor:
        """Return x with its first rows as the source sends them, and copies of the last one after these."""
        if self._muted:
            return x_TM.zero_()
        call = self.ledger.call(Collective.SEND, (source, self.groups.rank), 0)
        self.waited(Pending(x_TM, dist.irecv(x_TM[:rows], source), call=call))
        x_TM[rows:] = x_TM[rows - 1]
        return x_TM

    def start_broadcast(self, x: Tensor, source: int) -> Pending:
        """Begin to give everyone what the source has, in x's own memory; it is not counted."""
        world = self.groups.world
        if len(world) == 1 or self._muted:
            return Pending(x, None)
        return Pending(x, dist.broadcast(x, source, world.process_group, async_op=True))

    def waited(self, pending: Pending) -> Tensor:
        if pending.call is not None:
            self.ledger.awaited(pending.call)
        with self.waiting():
            return pending.wait()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait within this for other ranks or for a disk: that this rank gets no further is no sign that it hangs."""
        self._on_wait(True)
        yield
        self._on_wait(False)
