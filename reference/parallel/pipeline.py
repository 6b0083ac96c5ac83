"""Doing a schedule: events in order, each value going to where the next event needs it.

A stage hands its result to the next at the end of a slot, so an event can use only what an earlier slot has made. This
is checked: an event whose input has not arrived, a stage with two events in one slot, and a value that nobody takes all
raise `RequestError`, so a schedule that runs is a schedule that could run on real ranks.
"""

from collections.abc import Callable
from typing import TypeVar

from ...spec.errors import RequestError
from .schedule import Event, Schedule

Value = TypeVar("Value")
Result = TypeVar("Result")


def execute(
    schedule: Schedule,
    enter: Callable[[int, int, list[Result]], Value],
    work: Callable[[int, int, int, Value], Value],
    leave: Callable[[int, int, Value], Result],
) -> dict[tuple[int, int], Result]:
    """Do a schedule's events; returns what left the last stage, by micro-batch and token.

    `enter(micro_batch, token, results)` makes the input of stage 0 from the results that token waits for,
    `work(stage, micro_batch, token, value)` passes it through a stage, and `leave(micro_batch, token, value)` makes the
    result of it. Three stages that add 1, each token entering as ten times the one before:

    >>> from twinfer.reference.parallel.schedule import dynamic_queue
    >>> results = execute(
    ...     dynamic_queue(stages=3, micro_batches=2, tokens=2),
    ...     enter=lambda micro_batch, token, results: 10 * results[0] if token else micro_batch,
    ...     work=lambda stage, micro_batch, token, value: value + 1,
    ...     leave=lambda micro_batch, token, value: value,
    ... )
    >>> results
    {(0, 0): 3, (1, 0): 4, (0, 1): 33, (1, 1): 43}
    """
    arrived: dict[tuple[int, int, int], tuple[int, Value]] = {}
    results: dict[tuple[int, int], Result] = {}
    left_in_slot: dict[tuple[int, int], int] = {}
    busy: set[tuple[int, int]] = set()
    for event in sorted(schedule.events):
        if (event.slot, event.stage) in busy:
            raise RequestError(f"stage {event.stage} has two events in slot {event.slot}; it must have at most one")
        busy.add((event.slot, event.stage))
        if event.stage == 0:
            awaited = [(each, event.token - 1) for each in schedule.awaited(event.micro_batch, event.token)]
            _require_earlier(event, [left_in_slot.get(each) for each in awaited])
            value = enter(event.micro_batch, event.token, [results[each] for each in awaited])
        else:
            key = event.stage, event.micro_batch, event.token
            _require_earlier(event, [arrived[key][0] if key in arrived else None])
            _, value = arrived.pop(key)
        value = work(event.stage, event.micro_batch, event.token, value)
        if event.stage + 1 < schedule.stages:
            arrived[event.stage + 1, event.micro_batch, event.token] = event.slot, value
        else:
            results[event.micro_batch, event.token] = leave(event.micro_batch, event.token, value)
            left_in_slot[event.micro_batch, event.token] = event.slot
    if arrived:
        raise RequestError(f"nothing takes what arrives for (stage, micro-batch, token) = {next(iter(arrived))}")
    return results


def _require_earlier(event: Event, slots: list[int | None]) -> None:
    if any(slot is None or slot >= event.slot for slot in slots):
        raise RequestError(f"{event} begins before its input is there; that must come from an earlier slot")
