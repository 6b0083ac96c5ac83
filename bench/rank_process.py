"""One process that `bench.ranks` measures: a rank of a job, or the compiled path alone.

Shapes: B sequences, T tokens.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ..checkpoint import open_model
from ..compiled.path import CompiledPath, Mode
from ..oracle.models import RandomSource
from ..parallel.compiling import compile_in_turn
from ..parallel.leading import Leader, follow
from ..parallel.member import joined
from ..parallel.path import RankPath
from ..parallel.watch import Doing
from ..parallel.wire import Wire
from ..spec.config import LayerConfig, ModelConfig
from ..spec.parallel import ParallelConfig
from ..spec.shard import Shard
from ..spec.weights import EmbeddingWeights, HeadWeights, LayerWeights, WeightSource
from .machine import peak_resident_bytes
from .timing import quantile

EIGHT_HEADS = "smollm2 with 8 query heads"
"""Random weights of SmolLM2's sizes, but 8 query heads and 2 key/value heads, which two ranks can share."""
CONTEXT_BEFORE = 16
STEPS = 4
"""Decode steps that one sample averages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The model that a process loads, and the degrees by which it is divided."""

    model: str
    parallel: ParallelConfig | None = None
    """None for the compiled path."""
    batches: bool = False
    """Whether steps of several sequences are compiled too."""
    layers: int | None = None
    """The first layers only."""
    compiled: bool = True


class FirstLayers:
    """A source of a model's first layers."""

    def __init__(self, source: WeightSource, layers: int) -> None:
        self.config = replace(source.config, layers=source.config.layers[:layers])
        self._source = source

    def embedding(self, shard: Shard | None = None) -> EmbeddingWeights:
        return self._source.embedding(shard)

    def layer(self, index: int, shard: Shard | None = None) -> LayerWeights:
        return self._source.layer(index, shard)

    def head(self, shard: Shard | None = None) -> HeadWeights:
        return self._source.head(shard)


def source_of(work: Work) -> WeightSource:
    """Return where the weights come from."""
    if work.model == EIGHT_HEADS:
        source: WeightSource = RandomSource(with_eight_heads(open_model("smollm2").config))
    else:
        source = open_model(work.model).source
    return source if work.layers is None else FirstLayers(source, work.layers)


def with_eight_heads(config: ModelConfig) -> ModelConfig:
    """Return the config with 8 query heads and 2 key/value heads in each layer."""

    def cut(layer: LayerConfig) -> LayerConfig:
        return replace(layer, attention=replace(layer.attention, heads=8, kv_heads=2))

    return replace(config, layers=tuple(map(cut, config.layers)))


class Process:
    """A path in a process of its own. Ranks of a job are called together, with equal arguments; times are seconds."""

    def __init__(self, work: Work) -> None:
        torch.set_grad_enabled(False)
        self._stack = ExitStack()
        self._open: dict[int, Any] = {}
        self._member = None
        self.path: RankPath | CompiledPath
        if work.parallel is None:
            self.path = CompiledPath(source_of(work))
            self.path.compile(batches=work.batches)
            return
        self._member = self._stack.enter_context(joined(work.parallel, {}))
        wire = Wire(self._member.groups, self._member.progress.wait)
        mode = Mode.COMPILED if work.compiled else Mode.EAGER
        self.path = RankPath(source_of(work), wire, device=torch.device("cpu"), mode=mode)
        if work.compiled:
            compile_in_turn(self.path, self._member, batches=work.batches)
        self._member.progress.doing = Doing.READING  # which may take any time: the parent decides when something runs

    def prefill(self, tokens: int, prompts: int = 1) -> float:
        """Return the time of reading so many prompts, each of so many tokens."""
        sequences = self.path.open(prompts, tokens)
        given = [self._tokens(tokens) for _ in range(prompts)]
        self._meet()
        seconds = _timed(lambda: self.path.extend(sequences, given))
        sequences.close()
        return seconds

    def step(self, batch: int) -> float:
        """Return the time of a decode step."""
        if batch not in self._open:
            sequences = self.path.open(batch, 512)
            self._open[batch] = sequences
            self.path.extend(sequences, [self._tokens(CONTEXT_BEFORE)] * batch)
        self._meet()
        return self._steps(batch)

    def step_plain(self, batch: int) -> float:
        """Return the time of a decode step that is not recorded."""
        assert isinstance(self.path, RankPath)
        graphs, self.path._graphs = self.path._graphs, None
        try:
            return self.step(batch)
        finally:
            self.path._graphs = graphs

    def calls(self, batch: int) -> list[tuple[str, tuple[int, ...], int]]:
        """Return kind, ranks and bytes of each collective of one decode step."""
        assert isinstance(self.path, RankPath)
        before = len(self.path.wire.ledger.calls)
        self.path.extend(self._open[batch], [torch.tensor([1])] * batch)
        return [(call.kind.value, call.ranks, call.bytes) for call in self.path.wire.ledger.calls[before:]]

    def calls_of_prompts(self, tokens: int, prompts: int) -> list[tuple[str, tuple[int, ...], int]]:
        """Return the same of reading prompts."""
        assert isinstance(self.path, RankPath)
        before = len(self.path.wire.ledger.calls)
        self.prefill(tokens, prompts)
        return [(call.kind.value, call.ranks, call.bytes) for call in self.path.wire.ledger.calls[before:]]

    def collective(self, rows: int, times: int) -> float:
        """Return the median time of one all-reduce of [rows, hidden] in the tensor group, made one after the other."""
        assert isinstance(self.path, RankPath)
        assert self._member is not None
        wire, group = self.path.wire, self._member.groups.tensor
        x = torch.zeros(rows, self.path.config.hidden)
        self._meet()
        return quantile([_timed(lambda: wire.all_reduce(x, group)) for _ in range(times)], 0.5)

    def pipeline(self, micro_batches: int, tokens: int, rounds: int) -> list[tuple[float, float]] | None:
        """Return, on rank 0, the times of the baseline schedule and of the dynamic queue, by turns.

        Every micro-batch is one sequence that gains so many tokens after its prompt. Called once in a job's life.
        """
        assert isinstance(self.path, RankPath)
        assert self._member is not None
        try:
            if not self._member.leads:
                follow(self.path, self._member)
                return None
            leader = Leader(self.path, self._member)
            try:
                times = [
                    (
                        _generation(leader, micro_batches, tokens, queued=False),
                        _generation(leader, micro_batches, tokens, queued=True),
                    )
                    for _ in range(rounds + 1)
                ]
            finally:
                leader.end()
            return times[1:]
        finally:
            self._member.progress.doing = Doing.READING

    def step_alone(self, batch: int) -> float:
        """Return the time of a decode step that only computes: what it would send and receive is left out."""
        assert isinstance(self.path, RankPath)
        with self.path.wire.muted():
            return self._steps(batch)

    def memory(self) -> tuple[int | None, int]:
        """Return the peak of this process, and the bytes of the weights that it holds."""
        assert isinstance(self.path, RankPath)
        storages = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in pytree.tree_leaves(self.path.share.model)
            if isinstance(each, Tensor)
        }
        return peak_resident_bytes(), sum(storages.values())

    def leave(self) -> None:
        """Leave the job."""
        self._stack.close()

    def _steps(self, batch: int) -> float:
        given = [torch.tensor([1])] * batch

        def steps() -> None:
            for _ in range(STEPS):
                self.path.extend(self._open[batch], given)

        return _timed(steps) / STEPS

    def _meet(self) -> None:
        if self._member is not None and self._member.groups.parallel.ranks > 1:
            dist.barrier()

    def _tokens(self, count: int) -> Tensor:
        return torch.arange(count) % self.path.config.vocabulary


def _generation(leader: Leader, micro_batches: int, tokens: int, *, queued: bool) -> float:
    """Generate by the baseline schedule, or with each micro-batch submitted again as soon as its logits are there."""
    batches = [leader.open(1, CONTEXT_BEFORE + tokens) for _ in range(micro_batches)]
    prompt = torch.arange(CONTEXT_BEFORE)
    due: list[Any] = [leader.extend(each, [prompt]) for each in batches]
    left = [tokens] * micro_batches
    start = time.perf_counter()

    def submit(place: int) -> Any:
        left[place] -= 1
        return leader.submit(batches[place], [_best(due[place])])

    tickets: list[Any] = [submit(place) for place in range(micro_batches)]
    while any(ticket is not None for ticket in tickets):
        for place in range(micro_batches):
            due[place] = leader.collect(tickets[place])
            if queued:
                tickets[place] = submit(place) if left[place] else None
        if not queued:
            tickets = [submit(place) if left[place] else None for place in range(micro_batches)]
    seconds = time.perf_counter() - start
    for each in batches:
        each.close()
    return seconds


def _best(logits_BV: Tensor) -> Tensor:
    return logits_BV[0].argmax()[None]


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
