"""What a step of many ranks takes: measured by all of them together, predicted by the one that leads.

All ranks compute with layers that stay where they are (`StreamedRankPath.measure`), so what each needs for its layers
is known with all sums over ranks, and without the disk. The disk's speed is measured by one rank while the others rest;
ranks of a stage share it. Stages follow each other: while one computes, the others read ahead as far as buffers go.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..parallel.sequences import ParallelSequences
from ..parallel.weights import local_config
from ..spec.config import ModelConfig
from ..spec.parallel import ParallelConfig
from .gathering import readers_of
from .measuring import MARGIN, RUNS, Prediction, Speeds, Step, Sweep, measure, search_batch, seen, swept_s
from .plan import Plan, call_bytes, chosen_bytes
from .rank_plan import fitting_plan, least_budget, plan_of_rank, read_by, too_small
from .sequences import TieredSequences
from .shares import Shares
from .store import Store

if TYPE_CHECKING:
    from .rank_path import StreamedRankPath

Measure = Callable[[int, int, int], Sequence[Sequence[int]]]
"""(batch, tokens of each sequence, tokens of a prompt or 1 for a step) -> nanoseconds on each rank, of layers, the
head, the rest, and moving keys and values: a call of `StreamedRankPath.measure` on all ranks."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks of a job have in common; `budget` and `dram_budget` are each one's."""

    shares: Shares
    config: ModelConfig
    parallel: ParallelConfig
    budget: int
    dram_budget: int
    compute: torch.dtype
    expands: bool

    def plan(self, rank: int, batch: int, reserve: int) -> Plan:
        """Return a rank's plan; raises `RequestError` where its budget is too small."""
        return plan_of_rank(*self._of(rank), **self._budgets(), batch=batch, reserve=reserve)

    def plans(self, batch: int, reserve: int) -> list[Plan]:
        """Return all ranks' plans; raises `RequestError`, which names the smallest budget that works for each."""
        given: dict[str, Any] = {"batch": batch, "reserve": reserve}
        of_ranks = [self._of(rank) for rank in range(self.parallel.ranks)]
        plans = [
            fitting_plan(store, config, parallel, rank, **self._budgets(), **given)
            for store, config, parallel, rank in of_ranks
        ]
        if None in plans:
            different = {  # of ranks whose records have the same sizes, one
                (config, readers_of(parallel, rank).index(rank), *(record.nbytes for record in store.records)): each
                for each in of_ranks
                for store, config, parallel, rank in [each]
            }
            given |= {"compute": self.compute, "expands": self.expands}
            least = max(least_budget(*each, **given) for each in different.values())
            raise too_small(self.budget, batch, reserve, least)
        return [each for each in plans if each is not None]

    def most_batch(self, reserve: int, prompts: int, *, away: bool) -> int:
        """Return how many of some prompts every rank has room for; `away`: with whole layers' caches in a file.

        Raises `RequestError` where that is not even one.
        """
        self.plans(1, reserve)

        def fits(batch: int) -> bool:
            for rank in range(self.parallel.ranks):
                made = fitting_plan(*self._of(rank), **self._budgets(), batch=batch, reserve=reserve)
                if made is None or made.block_tokens or (made.away_layers and not away):
                    return False
            return True

        least, over = 1, 2
        while over <= prompts and fits(over):
            least, over = over, 2 * over
        over = min(over, prompts + 1)
        while over - least > 1:
            middle = (least + over) // 2
            least, over = (middle, over) if fits(middle) else (least, middle)
        return least

    def predict(
        self, batch: int, reserve: int, speeds: Speeds, step: Sequence[Step], prompt: tuple[int, Sequence[Step]] | None
    ) -> Prediction:
        """Return what a step takes, and a prompt token if a prompt of so many tokens was measured, by all ranks."""
        plans = self.plans(batch, reserve)
        step_s = self._passed_s(plans, [each.step_bytes for each in plans], speeds, step)
        prompt_token_s = math.nan
        if prompt is not None:
            tokens, found = prompt
            sweeps, rows = self._sweeps(plans, batch, tokens)
            times = -(-batch // self.parallel.data) / sweeps
            more = [Step(computing=each.computing.times(times), kv_s=0.0) for each in found]
            read = [each.step_bytes + self._more_experts(rank, rows, batch) for rank, each in enumerate(plans)]
            prompt_token_s = sweeps * self._passed_s(plans, read, speeds, more) / (batch * tokens)
        return Prediction(
            step_s=step_s,
            token_s=step_s / batch,
            prompt_token_s=prompt_token_s,
            hiding_tokens=batch * self.read_s(plans, speeds) / self.computed_s(step),
        )

    def read_s(self, plans: Sequence[Plan], speeds: Speeds) -> float:
        """Return the seconds for which all ranks together read in a step, from one disk."""
        disk_s = sum(each.step_bytes for each in plans) / speeds.disk
        return max(disk_s, max(each.copied_bytes for each in plans) / speeds.copies)

    def computed_s(self, step: Sequence[Step]) -> float:
        """Return the seconds of a step without its reads."""
        stages = [max(each.layers_s + each.head_s for each in stage) for stage in self._stages(step)]
        return sum(stages) + self._rest_s(step, stages)

    def best_batch(self, measured: Measure, reserve: int, prompts: int) -> int:
        """Return how many of some prompts to run at once, as `measuring.best_batch` does for one rank."""
        here, most = (self.most_batch(reserve, prompts, away=away) for away in (False, True))
        speeds = self.speeds(self.plan(0, 1, reserve))

        def hiding(batch: int) -> tuple[int, float]:
            step = steps_of(measured(batch, reserve, 1))
            found = self.predict(batch, reserve, speeds, step, None)
            return math.ceil(found.hiding_tokens * MARGIN), found.token_s

        return search_batch(here, most, prompts, hiding)

    def speeds(self, plan: Plan) -> Speeds:
        """Measure the speeds of this machine, by the records of the first share."""
        return measure(next(iter(self.shares.stores.values())), plan.slots)

    def _passed_s(self, plans: Sequence[Plan], read: Sequence[int], speeds: Speeds, steps: Sequence[Step]) -> float:
        stages = [max(each.layers_s + each.head_s for each in stage) for stage in self._stages(steps)]
        rest_s = self._rest_s(steps, stages)
        passed_s, ranks = rest_s, self.parallel.stage_ranks
        shared = replace(speeds, disk=speeds.disk / ranks)
        for stage, computed_s in enumerate(stages):
            others_s, slowest_s = rest_s + sum(stages) - computed_s, 0.0
            for rank in range(stage * ranks, (stage + 1) * ranks):
                store, computing = read_by(self._store(rank), self.parallel, rank), steps[rank].computing
                given = plans[rank], read[rank], steps[rank].kv_s, shared, replace(computing, rest_s=others_s)
                slowest_s = max(slowest_s, swept_s(store, *given) - others_s)
            passed_s += slowest_s
        return passed_s

    def _stages(self, steps: Sequence[Step]) -> list[list[Sweep]]:
        ranks = self.parallel.stage_ranks
        return [[each.computing for each in steps[first : first + ranks]] for first in range(0, len(steps), ranks)]

    def _rest_s(self, steps: Sequence[Step], stages: Sequence[float]) -> float:
        """Return what passes on every rank while no stage computes."""
        return max(0.0, min(each.computing.total_s for each in steps) - sum(stages))

    def _sweeps(self, plans: Sequence[Plan], batch: int, tokens: int) -> tuple[int, int]:
        """Return in how many sweeps a batch's prompts go through the layers, and how many tokens share one."""
        own = -(-batch // self.parallel.data)
        together = min(
            plan.flight_bytes // call_bytes(*self._of(rank)[:2], tokens, tokens) for rank, plan in enumerate(plans)
        )
        return -(-own // max(1, together)), min(own, max(1, together)) * tokens

    def _more_experts(self, rank: int, rows: int, batch: int) -> int:
        """Return the bytes of experts that a sweep of prompts reads beyond those of a step."""
        store, config = self._of(rank)[:2]
        own = -(-batch // self.parallel.data)
        more = chosen_bytes(store, config, rows) - chosen_bytes(store, config, own)
        return -(-more // len(readers_of(self.parallel, rank)))

    def _store(self, rank: int) -> Store:
        return self.shares.of_rank(self.parallel, rank)

    def _of(self, rank: int) -> tuple[Store, ModelConfig, ParallelConfig, int]:
        stage = self.parallel.place(rank).stage
        return self._store(rank), local_config(self.config, self.parallel, stage), self.parallel, rank

    def _budgets(self) -> dict[str, Any]:
        return {
            "budget": self.budget,
            "dram_budget": self.dram_budget,
            "compute": self.compute,
            "expands": self.expands,
        }


def steps_of(measured: Sequence[Sequence[int]]) -> list[Step]:
    """Return what was measured on each rank, in seconds."""
    steps = []
    for each in measured:
        layers_s, head_s, rest_s, kv_s = (count / 1e9 for count in each)
        steps.append(Step(computing=Sweep(layers_s=layers_s, head_s=head_s, rest_s=rest_s), kv_s=kv_s))
    return steps


def computed_here(path: "StreamedRankPath", batch: int, reserve: int, tokens: int) -> list[int]:
    """Compute with layers that stay, on all ranks; returns this one's nanoseconds in the order that `steps_of` reads.

    A step of a batch, its sequences being half as long as is planned; or a prompt of each data group.
    """
    count, step = (batch, True) if tokens == 1 else (path.job.parallel.data, False)
    generator, found = torch.Generator().manual_seed(0), []
    sequences = path.open(count, reserve)
    if step:
        _fill(sequences, max(0, reserve // 2 - RUNS))
    with path.still():
        for _ in range(RUNS):
            if not step:
                sequences.close()
                sequences = path.open(count, reserve)
            given_BT = torch.randint(path.config.vocabulary, (count, tokens), generator=generator)
            begin_s = time.perf_counter()
            path.extend(sequences, list(given_BT))
            passed_s = time.perf_counter() - begin_s
            found.append(seen([each for each in path.events if each.begin_s >= begin_s], path.layer_records, passed_s))
    sequences.close()
    computing, kv_s = min(found, key=lambda each: each[0].total_s)
    return [round(1e9 * each) for each in (computing.layers_s, computing.head_s, computing.rest_s, kv_s)]


def _fill(sequences: ParallelSequences, tokens: int) -> None:
    """Have all sequences hold so many tokens, whatever these are."""
    local = sequences.local
    assert isinstance(local, TieredSequences)
    sequences.advance([tokens] * len(sequences.lengths))
    local.advance([tokens] * len(local.lengths), local.last_BV)
    local.rewrite()
