"""A schedule in time, and as a picture."""

from .schedule import Schedule


def makespan(schedule: Schedule, *, prompt_time: float, token_time: float) -> float:
    """Return how long a schedule takes if each stage does its events in order, each as early as it can.

    `prompt_time` is what the prompts of the whole batch take on one stage, `token_time` what one micro-batch takes for
    a token on one stage, however small it is. Prompts in m micro-batches take prompt_time * (1 + (P - 1) / m).

    >>> from twinfer.reference.parallel.schedule import hybrid
    >>> makespan(hybrid(2, 4, 2, 1), prompt_time=8.0, token_time=1.0)
    10.0
    """
    free = [0.0] * schedule.stages
    done: dict[tuple[int, int], float] = {}
    for event in sorted(schedule.events, key=lambda event: (event.token, event.micro_batch, event.stage)):
        if event.stage == 0:
            before = [done[each, event.token - 1] for each in schedule.awaited(event.micro_batch, event.token)]
            start = max(before, default=0.0)
        else:
            start = done[event.micro_batch, event.token]
        duration = token_time if event.token else prompt_time / schedule.prompt_batches
        free[event.stage] = max(start, free[event.stage]) + duration
        done[event.micro_batch, event.token] = free[event.stage]
    return max(free)


def picture(schedule: Schedule) -> str:
    """Draw a line a stage and a column a slot: the micro-batch's letter with the token, or a dot for a bubble."""
    cells = {(event.stage, event.slot): f"{_letter(event.micro_batch)}{event.token}" for event in schedule.events}
    width = max(map(len, cells.values()))
    lines = []
    for stage in range(schedule.stages):
        row = (cells.get((stage, slot), ".").ljust(width) for slot in range(schedule.slots))
        lines.append(f"stage {stage}  {' '.join(row)}".rstrip())
    return "\n".join(lines)


def _letter(micro_batch: int) -> str:
    return chr(ord("a") + micro_batch) if micro_batch < 26 else f"{micro_batch}."
