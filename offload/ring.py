"""Which buffer of a fixed few holds what: the rules by which buffers are filled, used and filled again.

Tickets count the records that are streamed, 0, 1, 2, ..., and ticket t lies in buffer t % N: each buffer is filled
after the one before it, and used in that order. A buffer goes round

    FREE -> (claim) FILLING -> (filled) READY -> (take) IN_USE -> (release) FREE

With N = 2 the record of ticket 2 is read into buffer 0 only once ticket 0 is released:

    >>> ring = Ring(2)
    >>> ring.claim(), ring.claim(), ring.claim()
    (0, 1, None)
    >>> ring.filled(0); ring.take(), ring.claim()
    (0, None)
    >>> ring.release(0); ring.claim(), ring.slot(2)
    (2, 0)

There is no thread and no memory here, so that the rules can be tested by themselves. Whoever calls holds a lock.
"""

from enum import Enum, auto


class State(Enum):
    FREE = auto()
    FILLING = auto()
    """Being read into."""
    READY = auto()
    """Holds what was read, not yet used."""
    IN_USE = auto()


class Ring:
    """Buffers in turn. Breaking a rule raises `AssertionError`: it is a fault of this package."""

    def __init__(self, slots: int) -> None:
        assert slots >= 1
        self.slots = slots
        self._states = [State.FREE] * slots
        self._holders = [-1] * slots
        """The ticket that each buffer was claimed for last."""
        self._next_claimed = 0
        self._next_taken = 0

    def slot(self, ticket: int) -> int:
        """Return the buffer of a ticket."""
        return ticket % self.slots

    def state(self, ticket: int) -> State:
        """Return the state of a ticket's buffer, whoever holds it."""
        return self._states[self.slot(ticket)]

    def claim(self) -> int | None:
        """Return the next ticket to read, its buffer now FILLING; None while that buffer is not free."""
        ticket = self._next_claimed
        if self.state(ticket) is not State.FREE:
            return None
        self._holders[self.slot(ticket)] = ticket
        self._move(ticket, State.FREE, State.FILLING)
        self._next_claimed += 1
        return ticket

    def filled(self, ticket: int) -> None:
        """Note that all of a ticket's bytes are there."""
        self._move(ticket, State.FILLING, State.READY)

    def take(self) -> int | None:
        """Return the next ticket to use, its buffer now IN_USE; None while its bytes are not there."""
        ticket = self._next_taken
        if ticket >= self._next_claimed or self.state(ticket) is not State.READY:
            return None
        self._move(ticket, State.READY, State.IN_USE)
        self._next_taken += 1
        return ticket

    def release(self, ticket: int) -> None:
        """Give back a ticket's buffer, which nothing reads any more."""
        self._move(ticket, State.IN_USE, State.FREE)

    def reset(self) -> None:
        """Begin anew with ticket 0. Nothing may be being read into any buffer."""
        assert State.FILLING not in self._states
        self._states = [State.FREE] * self.slots
        self._next_claimed = self._next_taken = 0

    def _move(self, ticket: int, before: State, after: State) -> None:
        holder = self._holders[self.slot(ticket)]
        assert holder == ticket, f"buffer {self.slot(ticket)} is held by ticket {holder}, not {ticket}"
        assert self.state(ticket) is before, f"ticket {ticket} is {self.state(ticket)}, not {before}"
        self._states[self.slot(ticket)] = after
