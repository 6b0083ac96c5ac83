"""What is done to a path in a comparison: sequences opened, extended and closed, in any order.

A schedule is plain data, drawn by a picker; it prints in one line of Python that makes it again. Tokens are given as
ids or left to the model: `GREEDY` stands for the token that the truth finds likeliest, so every path is fed the same.
"""

from dataclasses import dataclass

from ..spec.config import ModelConfig
from .case import Picker

GREEDY = -1
"""In the place of a token id: whatever the truth chooses next."""


@dataclass(frozen=True, slots=True)
class Open:
    group: str
    batch: int
    reserve: int


@dataclass(frozen=True, slots=True)
class Extend:
    group: str
    new_tokens: tuple[tuple[int, ...], ...]
    """One tuple for each sequence; `(GREEDY,)` for a decode step."""
    every_position: bool = False


@dataclass(frozen=True, slots=True)
class Close:
    group: str


Step = Open | Extend | Close
Schedule = tuple[Step, ...]


def generation(prompts: tuple[tuple[int, ...], ...], new_tokens: int, *, reserve: int | None = None) -> Schedule:
    """A batch of prompts, each followed greedily for a number of tokens.

    >>> generation(((5, 7),), 2)[1:]
    (Extend(group='a', new_tokens=((5, 7),), every_position=True), Extend(group='a', new_tokens=((-1,),), \
every_position=False), Close(group='a'))
    """
    longest = max(len(prompt) for prompt in prompts)
    decode = Extend("a", ((GREEDY,),) * len(prompts))
    first = Extend("a", prompts, every_position=True)
    return (Open("a", len(prompts), reserve or longest + new_tokens), first, *[decode] * (new_tokens - 1), Close("a"))


def draw_schedule(pick: Picker, config: ModelConfig, *, max_steps: int = 8, max_piece: int = 7) -> Schedule:
    """Ragged prompts, chunks, runs of decode steps, sequences given nothing, growth beyond what was reserved.

    Two groups may be open at a time, so that what one leaves behind can disturb the other.
    """
    steps: list[Step] = []
    lengths: dict[str, list[int]] = {}
    opened = 0
    for _ in range(pick.integer(1, max_steps)):
        if not lengths or (len(lengths) < 2 and pick.integer(0, 4) == 4):
            group = f"g{opened}"
            opened += 1
            lengths[group] = [0] * pick.integer(1, 3)
            steps.append(Open(group, len(lengths[group]), pick.integer(1, min(config.context, 12))))
        group = pick.choice(sorted(lengths))
        held = lengths[group]
        kind = pick.choice(("extend", "decode", "close")) if all(held) else "extend"
        if kind == "close":
            steps.append(Close(group))
            del lengths[group]
        elif kind == "decode":
            for _ in range(pick.integer(1, 3)):
                if max(held) < config.context:
                    step = Extend(group, tuple((GREEDY,) if pick.integer(0, 5) else () for _ in held))
                    steps.append(step)
                    held[:] = [h + len(new) for h, new in zip(held, step.new_tokens, strict=True)]
        else:
            pieces = tuple(
                _tokens(pick, config, pick.integer(0 if h else 1, max_piece), config.context - h) for h in held
            )
            steps.append(Extend(group, pieces, every_position=bool(pick.integer(0, 1))))
            held[:] = [h + len(piece) for h, piece in zip(held, pieces, strict=True)]
    return (*steps, *(Close(group) for group in lengths))


def _tokens(pick: Picker, config: ModelConfig, wanted: int, room: int) -> tuple[int, ...]:
    return tuple(pick.integer(0, config.vocabulary - 1) for _ in range(min(wanted, room)))
