"""One job of many ranks: a model cut for them, and how a round of sequences passes its stages.

Sequences are dealt out to the data groups in turn: of a batch on two data groups, sequences 0, 2, 4 ... belong to the
first. Those that are computed at the same time, one in each data group, make a round; where there are fewer sequences
than groups, the last groups have none. A sequence's keys and values stay on the ranks that computed them: those of its
data group on every stage, each with its own heads.

Shapes: R ranks of a stage (a list), B = 1, T new tokens, M hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...spec.config import ModelConfig
from ...spec.parallel import ParallelConfig, stage_layers
from ..cache import KVCache
from ..components import DEFAULT
from .collectives import send
from .ledger import Ledger
from .ranks import Caches, RankWeights, empty_caches
from .stage import Stage
from .tensor import layer
from .vocabulary import embed_over_ranks, logits_over_ranks


@dataclass(frozen=True, slots=True, eq=False)
class SequenceState:
    caches: Caches
    last_logits_V: Tensor | None = None

    @property
    def length(self) -> int:
        """How many tokens the first stage has seen; on their way, later stages have seen fewer."""
        return self.caches[0][0][0].length


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    config: ModelConfig
    parallel: ParallelConfig
    weights: Sequence[Sequence[RankWeights]]
    """By stage and rank of the stage."""
    compute: torch.dtype
    device: torch.device
    ledger: Ledger = field(default_factory=Ledger)

    def new_sequence(self) -> SequenceState:
        return SequenceState(empty_caches(self.config, self.parallel, self.compute, self.device))

    def rounds(self, sequences: int) -> list[range]:
        """Divide sequences into rounds of neighbors, one for each data group."""
        data = self.parallel.data
        return [range(first, min(first + data, sequences)) for first in range(0, sequences, data)]

    def enter(self, members: range, states: Sequence[SequenceState], tokens: Sequence[Tensor]) -> list[Tensor]:
        """Embed a round's new tokens on the ranks of the first stage."""
        nothing_T = torch.empty(0, dtype=torch.int64, device=self.device)
        token_RBT, start_R = [], []
        for rank in range(self.parallel.stage_ranks):
            index = self._sequence_of(rank, members)
            token_RBT.append((nothing_T if index is None else tokens[index])[None])
            start_R.append(0 if index is None else states[index].length)
        embedding_R = [held.ends.embedding for held in self.weights[0]]
        return embed_over_ranks(token_RBT, start_R, embedding_R, self.config, self.compute, self._stage(0))

    def work(self, index: int, members: range, states: list[SequenceState], x_RBTM: list[Tensor]) -> list[Tensor]:
        """Pass a round through a stage's layers and grow its caches; a rank gets x from its like one stage before."""
        stage = self._stage(index)
        ranks = range(self.parallel.stage_ranks)
        if index > 0:
            sources, targets = self._stage(index - 1).numbers(ranks), stage.numbers(ranks)
            x_RBTM = [send(*each, self.ledger) for each in zip(x_RBTM, sources, targets, strict=True)]
        idle = self.new_sequence()
        held_RL: list[list[KVCache]] = []
        for rank in ranks:
            sequence = self._sequence_of(rank, members)
            state = idle if sequence is None else states[sequence]
            held_RL.append(list(state.caches[index][self.parallel.place(rank).tensor]))
        for place, number in enumerate(stage_layers(len(self.config.layers), self.parallel.pipeline)[index]):
            weights_R = [held.layers[place] for held in self.weights[index]]
            cache_R = [held_L[place] for held_L in held_RL]
            x_RBTM, cache_R = layer(x_RBTM, weights_R, self.config.layers[number], cache_R, stage)
            for held_L, cache in zip(held_RL, cache_R, strict=True):
                held_L[place] = cache
        for group, sequence in zip(self.parallel.tensor_groups, members, strict=False):
            grown = list(states[sequence].caches)
            grown[index] = tuple(tuple(held_RL[rank]) for rank in group)
            states[sequence] = replace(states[sequence], caches=tuple(grown))
        return x_RBTM

    def leave(self, x_RBTM: list[Tensor]) -> list[Tensor]:
        """Score what left the last stage: logits [T, V] for each data group, as its first rank has them."""
        stage = self._stage(self.parallel.pipeline - 1)
        hidden_RBTW = []
        for x_BTM, held in zip(x_RBTM, self.weights[-1], strict=True):
            head = held.ends.head
            if head.norm is not None and self.config.final_norm is not None:
                x_BTM = DEFAULT.norm(x_BTM, head.norm, self.config.final_norm)
            hidden_RBTW.append(x_BTM if head.reduction is None else DEFAULT.linear(x_BTM, head.reduction))
        projection_R = [held.ends.projection for held in self.weights[-1]]
        logits_RBTV = logits_over_ranks(hidden_RBTW, projection_R, self.config, stage)
        return [logits_RBTV[group[0]][0] for group in self.parallel.tensor_groups]

    def tell_first_stage(self, token_1: Tensor, member: int) -> None:
        """Have the data group of a round's member know, on the first stage, which token was chosen on the last."""
        group = self.parallel.tensor_groups[member]
        if self.parallel.pipeline > 1:
            sources, targets = self._stage(self.parallel.pipeline - 1).numbers(group), self._stage(0).numbers(group)
            for source, target in zip(sources, targets, strict=True):
                send(token_1, source, target, self.ledger)

    def _stage(self, index: int) -> Stage:
        return Stage(index, self.parallel, self.ledger)

    def _sequence_of(self, rank: int, members: range) -> int | None:
        data = self.parallel.place(rank).data
        return members[data] if data < len(members) else None
