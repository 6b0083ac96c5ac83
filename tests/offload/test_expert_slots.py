"""The rules of experts' slots, as a state machine: none is used before it is read, or given up while in use."""

from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twinfer.offload.expert_report import fewest
from twinfer.offload.expert_slots import Slots, State
from twinfer.offload.uses import Expert, Policy, Uses
from twinfer.reference.offload import expert_cache

EXPERTS = st.tuples(st.integers(0, 1), st.integers(0, 3))
PARTS = st.sampled_from([None, None, 0, 1])


class SlotsMachine(RuleBasedStateMachine):
    """Beside the slots, what was read into each; every use must find what it asked for."""

    slots_class = Slots

    def __init__(self) -> None:
        super().__init__()
        self.anew(1, 3, Policy.NEXT_USE)

    @rule(kept=st.integers(0, 4), spare=st.integers(1, 4), policy=st.sampled_from(list(Policy)))
    def anew(self, kept: int, spare: int, policy: Policy) -> None:
        self.slots = self.slots_class(Uses([4, 4], [2, 2], policy), kept=kept, spare=spare)
        self.content: dict[int, tuple[Expert, int | None]] = {}
        self.reading: dict[int, tuple[Expert, int | None]] = {}
        self.using: dict[int, tuple[Expert, int | None]] = {}

    @rule(expert=EXPERTS, part=PARTS, guess=st.booleans())
    def claim(self, expert: Expert, part: int | None, guess: bool) -> None:
        if self.slots.find(expert, part) is not None:
            return
        slot = self.slots.claim(expert, part, guess=guess and part is None)
        if slot is not None:
            assert slot not in self.using
            assert slot not in self.reading
            self.reading[slot] = expert, part
            self.content.pop(slot, None)  # half written

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), works=st.booleans())
    def read(self, data: st.DataObject, works: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.reading)))
        held = self.reading.pop(slot)
        if works:
            self.content[slot] = held
            self.slots.filled(slot)
        else:
            self.slots.failed(slot)

    @rule(expert=EXPERTS, part=PARTS)
    def use(self, expert: Expert, part: int | None) -> None:
        slot = self.slots.find(expert, part)
        if slot is None or self.slots.state(slot) is State.FILLING:
            return
        self.slots.use(slot)
        assert self.content[slot] in ((expert, None), (expert, part))
        self.using[slot] = self.content[slot]

    @rule()
    def want_all(self) -> None:
        for slot in self.slots.guessed:
            self.slots.want(slot)

    @rule()
    def drop_guesses(self) -> None:
        self.slots.drop_guesses()
        assert not self.slots.guessed

    @precondition(lambda self: self.using)
    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.using)))
        del self.using[slot]
        self.slots.done(slot)

    @rule()
    def settle(self) -> None:
        whole = {expert for expert, part in self.using.values() if part is None}
        self.slots.settle(whole)
        self.using = {}
        ready = [slot for slot in range(self.slots.kept + self.slots.spare) if self.slots.state(slot) is State.READY]
        assert len(set(ready) - self.slots.guessed) <= self.slots.kept

    @precondition(lambda self: not self.reading and not self.using)
    @rule(kept=st.integers(0, 4), spare=st.integers(1, 4))
    def resize(self, kept: int, spare: int) -> None:
        self.slots.resize(kept=kept, spare=spare)
        self.content = {slot: held for slot, held in self.content.items() if slot < kept + spare}

    @invariant()
    def what_is_used_stays(self) -> None:
        for slot, held in self.using.items():
            assert self.slots.state(slot) is State.IN_USE
            assert self.slots.holds(slot) == held == self.content[slot]


class TestSlots(SlotsMachine.TestCase):  # type: ignore[misc,name-defined]
    settings = settings(max_examples=30, stateful_step_count=40)


def _mutant(name: str, broken: Callable[..., object]) -> type[Slots]:
    return type("Mutant", (Slots,), {name: broken})


def _claims_what_is_used(self: Slots, expert: Expert, part: int | None = None, *, guess: bool = False) -> int | None:
    for slot, state in enumerate(self._states):
        if state is State.IN_USE:
            self._states[slot] = State.FREE
            self._free.insert(0, slot)
    return Slots.claim(self, expert, part, guess=guess)


def _finds_what_was_given_up(self: Slots, slot: int) -> None:
    self._holds[slot] = None


def _finds_any_part(self: Slots, expert: Expert, part: int | None = None) -> int | None:
    return next((slot for (each, _), slot in self._places.items() if each == expert), None)


def _finds_another_layers(self: Slots, expert: Expert, part: int | None = None) -> int | None:
    return next((slot for (each, of), slot in self._places.items() if each[1] == expert[1] and of == part), None)


def _uses_what_is_being_read(self: Slots, slot: int) -> State:
    return State.READY if self._states[slot] is State.FILLING else self._states[slot]


def _keeps_all(self: Slots, used: set[Expert]) -> None:
    for slot, state in enumerate(self._states):
        if state is State.IN_USE:
            self.done(slot)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("claim", _claims_what_is_used),
        ("_forget", _finds_what_was_given_up),
        ("find", _finds_any_part),
        ("find", _finds_another_layers),
        ("state", _uses_what_is_being_read),
        ("settle", _keeps_all),
    ],
)
def test_machines_see_broken_slots(name: str, broken: Callable[..., object]) -> None:
    """Each rule that is broken fails the machine."""
    machine = type("Machine", (SlotsMachine,), {"slots_class": _mutant(name, broken)})
    case = machine.TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=3000, stateful_step_count=40, database=None, phases=[Phase.generate], report_multiple_bugs=False
    )
    with pytest.raises((AssertionError, KeyError, IndexError)):
        case().runTest()


TRACES = st.lists(st.integers(0, 4), max_size=30)


def _fetched(trace: list[int], capacity: int, policy: Policy) -> list[int]:
    slots, fetched = Slots(Uses([5], [1], policy), kept=capacity, spare=1), []
    for place, number in enumerate(trace):
        slot = slots.find((0, number))
        if slot is None:
            fetched.append(place)
            slot = slots.claim((0, number))
            assert slot is not None
            slots.filled(slot)
        slots.use(slot)
        slots.settle({(0, number)})
    return fetched


@given(trace=TRACES, capacity=st.integers(1, 3))
def test_policies_are_those_of_the_reference(trace: list[int], capacity: int) -> None:
    """Of experts that are needed one by one, the same are fetched."""
    for policy, reference in (
        (Policy.LEAST_RECENT, expert_cache.least_recently_used),
        (Policy.LEAST_FREQUENT, expert_cache.least_frequently_used),
    ):
        assert _fetched(trace, capacity, policy) == expert_cache.fetches(trace, capacity, reference)


@given(trace=TRACES, capacity=st.integers(1, 3))
def test_nothing_fetches_less_than_the_bound(trace: list[int], capacity: int) -> None:
    """Neither a policy nor the reference's optimum, which must keep what it fetched; and with room for all, equal."""
    bound = len(fewest([(0, number) for number in trace], capacity))
    assert bound <= len(expert_cache.fetches(trace, capacity, expert_cache.optimal))
    assert all(bound <= len(_fetched(trace, capacity, policy)) for policy in Policy)
    assert len(fewest([(0, number) for number in trace], 5)) == len(set(trace))


@given(trace=st.lists(st.integers(0, 3), max_size=9), capacity=st.integers(1, 3))
def test_the_bound_is_the_best_of_all_choices(trace: list[int], capacity: int) -> None:
    """Of everything that could have been given up at each step, what was fetched just now included."""

    def best(rest: tuple[int, ...], held: frozenset[int]) -> int:
        if not rest:
            return 0
        now = held | {rest[0]}
        ways = [now] if len(now) <= capacity else [now - {gone} for gone in now]
        return (rest[0] not in held) + min(best(rest[1:], way) for way in ways)

    assert len(fewest([(0, number) for number in trace], capacity)) == best(tuple(trace), frozenset())


def test_uses_expect_what_was_used_often_and_of_late() -> None:
    """Of two experts the one used less goes, and of equals the one whose layer comes later."""
    uses = Uses([2, 2], [1, 1], Policy.NEXT_USE)
    for _ in range(5):
        uses.note({(0, 0)})
        uses.note({(1, 0)})
    held = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert uses.first_to_go(held, set()) == (1, 1)
    assert uses.first_to_go([(0, 0), (1, 0)], set()) == (1, 0)


def test_a_long_average_is_a_plain_mean_at_first() -> None:
    """Of what was expected before anything was seen, 1 of 4, and of 40 tokens; then the newest counts a 50th."""
    uses = Uses([4], [1], Policy.NEXT_USE)
    for token in range(40):
        uses.note({(0, 0 if token % 4 == 3 else 1)})
    assert uses._long[0] == pytest.approx([(0.25 + 10) / 41, (0.25 + 30) / 41, 0.25 / 41, 0.25 / 41])
    for _ in range(60):
        uses.note({(0, 2)})
    before = uses._long[0][3]
    uses.note({(0, 2)})
    assert uses._long[0][3] == pytest.approx(before * 49 / 50)
