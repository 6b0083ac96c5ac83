"""The ring's rules, as a state machine: no buffer is used before its data are there, or filled while in use."""

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twinfer.offload.ring import Ring, State

SLOTS = (1, 2, 3)


class RingMachine(RuleBasedStateMachine):
    """Buffers hold the ticket that was written last; the tickets that are read and used are counted beside."""

    ring_class = Ring

    def __init__(self) -> None:
        super().__init__()
        self.ring = self.ring_class(2)
        self.buffers: list[int | None] = [None] * 2
        self.reading: list[int] = []
        self.using: list[int] = []
        self.used = 0

    @precondition(lambda self: not self.reading and not self.using)
    @rule(slots=st.sampled_from(SLOTS))
    def anew(self, slots: int) -> None:
        self.ring, self.buffers, self.used = self.ring_class(slots), [None] * slots, 0

    @rule()
    def claim(self) -> None:
        ticket = self.ring.claim()
        if ticket is not None:
            assert all(self.ring.slot(ticket) != self.ring.slot(other) for other in (*self.using, *self.reading))
            self.reading.append(ticket)
            self.buffers[self.ring.slot(ticket)] = None  # half written

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def filled(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.reading))
        self.reading.remove(ticket)
        self.buffers[self.ring.slot(ticket)] = ticket
        self.ring.filled(ticket)

    @rule()
    def take(self) -> None:
        ticket = self.ring.take()
        if ticket is not None:
            assert ticket == self.used
            self.used += 1
            self.using.append(ticket)

    @precondition(lambda self: self.using)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.using))
        self.using.remove(ticket)
        self.ring.release(ticket)

    @precondition(lambda self: not self.reading)
    @rule()
    def reset(self) -> None:
        self.ring.reset()
        self.using, self.used = [], 0

    @invariant()
    def what_is_used_is_there(self) -> None:
        assert [self.buffers[self.ring.slot(ticket)] for ticket in self.using] == self.using


TestRing = RingMachine.TestCase


class ReusedEarly(Ring):
    def claim(self) -> int | None:
        if self.state(self._next_claimed) is State.IN_USE:
            self._states[self.slot(self._next_claimed)] = State.FREE
        return super().claim()


class TakenUnread(Ring):
    def take(self) -> int | None:
        if self._next_taken < self._next_claimed and self.state(self._next_taken) is State.FILLING:
            self._states[self.slot(self._next_taken)] = State.READY
        return super().take()


class Swapped(Ring):
    def take(self) -> int | None:
        ticket = super().take()
        return None if ticket is None else ticket ^ 1


class NotReset(Ring):
    def reset(self) -> None:
        self._states = [State.FREE] * self.slots


@pytest.mark.parametrize("mutant", [ReusedEarly, TakenUnread, Swapped, NotReset])
def test_mutants_of_the_ring_are_caught(mutant: type[Ring]) -> None:
    """The machine finds each broken rule."""
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Mutated", (RingMachine,), {"ring_class": mutant})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=settings(report_multiple_bugs=False, phases=[Phase.generate]))


def test_a_rule_that_is_broken_is_said() -> None:
    """Filling or releasing a ticket that is not held raises at once."""
    ring = Ring(2)
    assert (ring.claim(), ring.claim(), ring.claim()) == (0, 1, None)
    with pytest.raises(AssertionError, match="held by ticket 0"):
        ring.filled(2)
    with pytest.raises(AssertionError, match="FILLING, not"):
        ring.release(1)
