"""The ranks of one pipeline stage, and collectives within groups of them.

Everywhere in this package a suffix R is a list over the ranks of a stage, in the order of their numbers: `x_RBTM[r]` is
what rank r holds, a tensor [B, T, M].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ...spec.parallel import Groups, ParallelConfig
from .collectives import all_reduce
from .ledger import Ledger

Given = TypeVar("Given")
Got = TypeVar("Got")


@dataclass(frozen=True, slots=True)
class Stage:
    index: int
    parallel: ParallelConfig
    ledger: Ledger

    def numbers(self, group: Sequence[int]) -> list[int]:
        """Return the numbers in the whole job of ranks that are numbered within the stage."""
        return [self.index * self.parallel.stage_ranks + rank for rank in group]

    def within(
        self,
        groups: Groups,
        collective: Callable[[list[Given], list[int], Ledger], list[Got]],
        value_R: Sequence[Given],
    ) -> list[Got]:
        """Let each group do a collective of its own; returns what each rank gets.

        >>> stage = Stage(0, ParallelConfig(data=2, tensor=2), Ledger())
        >>> stage.within(stage.parallel.tensor_groups, all_reduce, [torch.tensor(each) for each in (1, 2, 30, 40)])
        [tensor(3), tensor(3), tensor(70), tensor(70)]
        """
        got: dict[int, Got] = {}
        for group in groups:
            results = collective([value_R[rank] for rank in group], self.numbers(group), self.ledger)
            got.update(zip(group, results, strict=True))
        return [got[rank] for rank in range(len(value_R))]

    def add_up(self, partial_R: Sequence[Tensor]) -> list[Tensor]:
        """All-reduce within each tensor group: the step that ends every product cut by columns."""
        return self.within(self.parallel.tensor_groups, all_reduce, partial_R)
