"""Places in memory for experts: which expert is where, which may go, and which goes.

Of `kept + spare` slots at most `kept` hold experts between two steps; the spare ones are what experts are read into. A
slot goes through

    FREE -> (claim) FILLING -> (filled) READY -> (use) IN_USE -> (settle) READY, or FREE if it is given up

`settle` ends the use of all slots and gives up experts until no more than `kept` are held, the one first whose next
use is expected last (`uses`). With kept = 1, expert b is used after a, which is given up then and no sooner:

    >>> from twinfer.offload.uses import Policy
    >>> slots = Slots(Uses([4], [1], Policy.LEAST_RECENT), kept=1, spare=1)
    >>> for expert in (0, 1):
    ...     slot = slots.claim((0, expert)); slots.filled(slot); slots.use(slot); slots.settle({(0, expert)})
    >>> slots.find((0, 0)), slots.find((0, 1))
    (None, 1)

A prompt's experts pass through spare slots, a part at a time (its up, then its down), and make nothing go. A part
stays where it was read until its slot is claimed again. Experts that were guessed lie in spare slots as well until
they are used, or dropped.

There is no thread and no memory here, so that the rules can be tested by themselves. Whoever calls holds a lock.
"""

from enum import Enum, auto

from .uses import Expert, Uses

Held = tuple[Expert, int | None]
"""An expert, and which of its parts; None for all of it."""


class State(Enum):
    FREE = auto()
    """Not claimed. It may still hold a part that was used."""
    FILLING = auto()
    """Being read into."""
    READY = auto()
    IN_USE = auto()
    """Computed with until `settle`."""


class Slots:
    """Slots and what they hold. Breaking a rule raises `AssertionError`: it is a fault of this package."""

    def __init__(self, uses: Uses, *, kept: int, spare: int) -> None:
        self.uses = uses
        self.kept, self.spare = kept, spare
        self._states = [State.FREE] * (kept + spare)
        self._holds: list[Held | None] = [None] * (kept + spare)
        self._places: dict[Held, int] = {}
        self._free = list(range(kept + spare))
        """Those whose content was used longest ago first."""
        self._guessed: set[int] = set()
        self._dropped: set[int] = set()
        """Guesses that are not wanted any more, and are still being read."""

    def find(self, expert: Expert, part: int | None = None) -> int | None:
        """Return the slot that holds an expert, or only the part of it that is asked for, or that is to hold it."""
        whole = self._places.get((expert, None))
        return whole if whole is not None or part is None else self._places.get((expert, part))

    def state(self, slot: int) -> State:
        return self._states[slot]

    def holds(self, slot: int) -> Held | None:
        return self._holds[slot]

    @property
    def in_use(self) -> list[int]:
        """The slots that are computed with."""
        return [slot for slot, state in enumerate(self._states) if state is State.IN_USE]

    @property
    def guessed(self) -> set[int]:
        """The slots of guesses that nobody has wanted yet."""
        return set(self._guessed)

    @property
    def held(self) -> int:
        """Experts that are held whole or being read, guesses not counted."""
        return sum(1 for (_, part), slot in self._places.items() if part is None and slot not in self._guessed)

    def claim(self, expert: Expert, part: int | None = None, *, guess: bool = False) -> int | None:
        """Return a free slot, now FILLING with an expert or a part of one; None where none is free."""
        assert (expert, part) not in self._places, f"{expert} is held already"
        if not self._free:
            return None
        slot = self._free.pop(0)
        self._move(slot, State.FREE, State.FILLING)
        self._forget(slot)
        self._holds[slot] = expert, part
        self._places[expert, part] = slot
        if guess:
            self._guessed.add(slot)
        return slot

    def filled(self, slot: int) -> None:
        """Note that all of a slot's bytes are there."""
        self._move(slot, State.FILLING, State.READY)
        if slot in self._dropped:
            self._dropped.discard(slot)
            self._give_up(slot)

    def failed(self, slot: int) -> None:
        """Note that a slot's bytes cannot be read."""
        self._move(slot, State.FILLING, State.READY)
        self._dropped.discard(slot)
        self._give_up(slot)

    def use(self, slot: int) -> None:
        """Let a slot be computed with; it may be in use already, or free and still hold a part."""
        held = self._holds[slot]
        assert held is not None, f"slot {slot} holds nothing"
        if self._states[slot] is State.FREE:
            assert held[1] is not None
            self._free.remove(slot)
            self._states[slot] = State.READY
        if self._states[slot] is not State.IN_USE:
            self._move(slot, State.READY, State.IN_USE)
        self._guessed.discard(slot)

    def done(self, slot: int) -> None:
        """End the use of one slot; a part that it holds is found until the slot is claimed again."""
        self._move(slot, State.IN_USE, State.READY)
        held = self._holds[slot]
        assert held is not None
        if held[1] is not None:
            self._release(slot)

    def want(self, slot: int) -> None:
        """Keep a guess that turned out right, though it may still be being read."""
        self._guessed.discard(slot)
        self._dropped.discard(slot)

    def drop_guesses(self) -> None:
        """Give up the guesses that nobody wanted."""
        for slot in list(self._guessed):
            self._guessed.discard(slot)
            if self._states[slot] is State.FILLING:
                self._dropped.add(slot)
            else:
                self._give_up(slot)

    def settle(self, used: set[Expert]) -> None:
        """End the use of all slots, and give up experts until at most `kept` are held. `used` are noted as uses."""
        self.uses.note(used)
        for slot, state in enumerate(self._states):
            if state is State.IN_USE:
                self.done(slot)
        whole = [
            (expert, slot)
            for (expert, part), slot in self._places.items()
            if part is None and slot not in self._guessed and self._states[slot] is State.READY
        ]
        surplus = len(whole) - self.kept
        for _ in range(surplus):
            gone = self.uses.first_to_go([expert for expert, _ in whole], used)
            slot = self._places[gone, None]
            whole.remove((gone, slot))
            self._give_up(slot)

    def resize(self, *, kept: int, spare: int) -> None:
        """Have another number of slots; nothing may be in use or being read."""
        assert not {State.IN_USE, State.FILLING} & set(self._states)
        self.drop_guesses()
        for slot in range(len(self._states)):
            if slot >= kept + spare and self._states[slot] is State.READY:
                self._give_up(slot)
        for slot in range(kept + spare, len(self._states)):
            self._forget(slot)
        more = range(len(self._states), kept + spare)
        self._free = [slot for slot in self._free if slot < kept + spare] + list(more)
        self._states = self._states[: kept + spare] + [State.FREE for _ in more]
        self._holds = self._holds[: kept + spare] + [None for _ in more]
        self.kept, self.spare = kept, spare
        self.settle(set())

    def _give_up(self, slot: int) -> None:
        self._forget(slot)
        self._release(slot, first=True)

    def _release(self, slot: int, *, first: bool = False) -> None:
        """Make a slot free; with `first` it is claimed before others."""
        self._move(slot, State.READY, State.FREE)
        self._guessed.discard(slot)
        self._free.insert(0 if first else len(self._free), slot)

    def _forget(self, slot: int) -> None:
        held = self._holds[slot]
        if held is not None:
            del self._places[held]
            self._holds[slot] = None

    def _move(self, slot: int, before: State, after: State) -> None:
        assert self._states[slot] is before, f"slot {slot} is {self._states[slot]}, not {before}"
        self._states[slot] = after
