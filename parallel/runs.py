"""Cutting a call's work into runs, which pass through the stages one after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ..compiled.linear import PASS_ROWS, passes
from ..compiled.programs import Program
from ..spec.config import Storage
from ..spec.parallel import ParallelConfig, prompt_pieces


class Run(NamedTuple):
    """What passes the stages at once."""

    program: Program
    members: list[int]
    """Places of the sequences among those of the data group; in a prefill there is one."""
    tokens: list[list[int]]
    """For each of them."""
    first: int
    """The position of a prefill's first token."""
    ends: bool
    """Whether logits follow: not after a prompt's pieces but the last, unless all are asked for."""


def runs_of(
    lengths: Sequence[int],
    tokens: Sequence[list[int]],
    storage: Storage,
    every_position: bool,
    parallel: ParallelConfig,
) -> list[Run]:
    """Cut a call's work into runs: steps first, then each longer extension in even pieces.

    >>> runs = runs_of([3, 0, 5], [[7], [1, 2], [8]], Storage.FLOAT32, False, ParallelConfig())
    >>> [(run.program.value, run.members, run.tokens) for run in runs]
    [('decode rows', [0, 2, 2, 2], [[7], [8], [8], [8]]), ('prefill', [1], [[1, 2]])]
    """
    single = [index for index, each in enumerate(tokens) if len(each) == 1]
    runs = []
    for taken in passes(len(single), storage) if single else []:
        members = [single[place] for place in taken]
        name = {1: Program.DECODE, PASS_ROWS: Program.DECODE_ROWS}.get(len(members), Program.DECODE_MANY)
        runs.append(Run(name, members, [tokens[member] for member in members], 0, True))
    for index in (index for index, each in enumerate(tokens) if len(each) > 1):
        pieces = torch.split(torch.tensor(tokens[index]), prompt_pieces(len(tokens[index]), parallel))
        first = lengths[index]
        for place, piece in enumerate(pieces, start=1):
            ends = every_position or place == len(pieces)
            runs.append(Run(Program.PREFILL, [index], [piece.tolist()], first, ends))
            first += len(piece)
    return runs


def together(runs: Sequence[Run], parallel: ParallelConfig) -> Iterator[list[Run]]:
    """Yield runs in their order: those that are computed by turns in pairs, others one by one.

    >>> prefill = Run(Program.PREFILL, [0], [[1, 2]], 0, True)
    >>> runs = [prefill._replace(program=Program.DECODE), *[prefill] * 3]
    >>> [len(each) for each in together(runs, ParallelConfig(tensor=2))]
    [1, 2, 1]
    """
    waiting: list[Run] = []
    for run in runs:
        waiting.append(run)
        if len(waiting) == 2 or run.program is not Program.PREFILL or not parallel.pairs:
            yield waiting
            waiting = []
    if waiting:
        yield waiting
