"""Choices of experts, judged: a router is discrete, as a greedy token is.

A near-tie in a router flips an expert, the hidden vector jumps, and no budget of errors survives that. So truth and
eager baseline are forced to the experts that a path reports. The choice is admissible if rounding explains it: for
every expert n that was chosen and every c that was not, of the groups that may be chosen from,

    score(c) - score(n)  <=  allowed(c) + allowed(n)                   scores in float64, choice bias included

The error of a row's router logits is at most a = 2 * (the largest error of an eager run's) + 2 eps(float32) * (its
largest logit), and
allowed(e) is by how far score(e) moves at most when every logit of the row moves by a: a itself for logits; for a
sigmoid, and for a softmax, where expert e goes up and all others go down, the ends are known. Two roundings of the
score to float32 are added. A group's score is the sum of its best two, so it is allowed twice the most of its experts.

Of a path that reports nothing truth and baseline follow the truth's own choice, and from the first token of a sequence
at which another choice would be admissible, its rows are left out: every later token attends to that one.

Shapes: T tokens, E experts, K chosen, G groups, N eager runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import torch
from torch import Tensor

from ..reference.routing import Routing, choice_weights, route
from ..spec.moe import RouterConfig, Score

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class RouteTie:
    """A token whose experts are not the truth's."""

    step: int
    sequence: int
    position: int
    layer: int
    """Counted among all layers."""
    chosen: tuple[int, ...] | None
    """None of a path that does not report its choices."""
    best: tuple[int, ...]
    gap: float
    allowed: float

    @property
    def admissible(self) -> bool:
        return self.gap <= self.allowed

    def __str__(self) -> str:
        where = f"step {self.step}, sequence {self.sequence}, position {self.position}, layer {self.layer}"
        chosen = "the path does not say which experts" if self.chosen is None else f"experts {list(self.chosen)}"
        return (
            f"{where}: {chosen} instead of {list(self.best)}; their scores are {self.gap:.3g} apart, and "
            f"{self.allowed:.3g} is allowed"
        )


@dataclass(slots=True)
class Forced:
    """A `route` component that makes given choices, or the reference's own, and remembers every call."""

    choices: list[Tensor] = field(default_factory=list)
    """[T, K] of each call to come; the reference's own where there is none left."""
    calls: list[tuple[Tensor, RouterConfig, Tensor | None, Tensor]] = field(default_factory=list)
    """Logits, config, choice bias, and what was chosen."""

    def __call__(self, logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None = None, /) -> Routing:
        routing = route(logit_TE, config, choice_bias_E)
        if self.choices:
            expert_TK = self.choices.pop(0).to(logit_TE.device)
            routing = Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))
        self.calls.append((logit_TE, config, choice_bias_E, routing.expert_TK))
        return routing

    def force(self, choices: Sequence[Tensor]) -> None:
        """Begin anew, with these choices for the next calls."""
        self.choices, self.calls = list(choices), []


@dataclass(frozen=True, slots=True)
class Judged:
    """One token's choice: how far its scores are behind what was left, and how far they may be."""

    gap: float
    allowed: float

    @property
    def excess(self) -> float:
        return self.gap - self.allowed

    @property
    def admissible(self) -> bool:
        return self.gap <= self.allowed


def ranking(logit_TE: Tensor, config: RouterConfig, choice_bias_E: Tensor | None) -> Tensor:
    """Return the scores in float64 by which experts are chosen."""
    return _scores(logit_TE.double(), config) + (0 if choice_bias_E is None else choice_bias_E.double())


def allowed_scores(logit_TE: Tensor, error_T: Tensor, config: RouterConfig, bias_E: Tensor | None) -> Tensor:
    """Return how far each score may be from the truth's, where a row's logits are off by `error_T` at most."""
    logit_TE, error_T1 = logit_TE.double(), error_T[:, None]
    score_TE = _scores(logit_TE, config)
    match config.score:
        case Score.SOFTMAX:
            up, down = (torch.sigmoid(torch.logit(score_TE) + sign * 2 * error_T1) for sign in (1, -1))
            moved_TE = torch.maximum(up - score_TE, score_TE - down).nan_to_num(0.0)
        case Score.SIGMOID:
            up, down = (torch.sigmoid(logit_TE + sign * error_T1) for sign in (1, -1))
            moved_TE = torch.maximum(up - score_TE, score_TE - down)
        case _:
            moved_TE = error_T1.expand_as(score_TE)
    size_TE = score_TE.abs() + (0 if bias_E is None else bias_E.double().abs())
    return moved_TE + 2 * _EPS * size_TE + torch.finfo(torch.float32).smallest_normal


def judge_choice(chosen: Sequence[int], score_E: Tensor, allowed_E: Tensor, config: RouterConfig) -> Judged:
    """Judge a reported choice: the gap and its bound where it is furthest out, in the groups that excuse it best."""
    size = config.experts // config.groups
    needed = {expert // size for expert in chosen}
    spare = [group for group in range(config.groups) if group not in needed]
    if len(needed) > config.kept_groups:
        return Judged(float("inf"), 0.0)
    of_groups = [
        _worst([*_groups_out(kept, score_E, allowed_E, config), *_experts_out(chosen, kept, score_E, allowed_E, size)])
        for more in combinations(spare, config.kept_groups - len(needed))
        for kept in [needed | set(more)]
    ]
    judged = min(of_groups, key=lambda each: each.excess)
    if config.score is not Score.SPARSEMIXER:
        return judged
    pairs = pairwise(chosen)  # its weights depend on who is chosen first
    return _worst([judged, *(_pair(second, first, score_E, allowed_E) for first, second in pairs)])


def nearest_call(score_E: Tensor, allowed_E: Tensor, config: RouterConfig, best: Sequence[int]) -> Judged:
    """Return the other choice that is nearest to be admissible: one expert, or one group, exchanged."""
    size = config.experts // config.groups
    group_G, of_group_G = _group_scores(score_E, allowed_E, config)
    kept = set(group_G.argsort(descending=True, stable=True)[: config.kept_groups].tolist())
    calls = [
        _pair(best_one, other, score_E, allowed_E)
        for best_one in best
        for other in range(config.experts)
        if other not in best and other // size in kept
    ]
    if len(kept) < config.groups:
        calls += [
            _pair(one, other, group_G, of_group_G)
            for one in kept
            for other in range(config.groups)
            if other not in kept
        ]
    if config.score is Score.SPARSEMIXER:
        calls += [_pair(first, second, score_E, allowed_E) for first, second in pairwise(best)]
    return min(calls, key=lambda each: each.excess, default=Judged(float("inf"), 0.0))


def on_an_edge(logit_E: Tensor, error: float, chosen: Sequence[int], config: RouterConfig) -> bool:
    """Whether rounding decides which experts a SparseMixer weight counts: those within `nearness` of the best."""
    if config.nearness is None:
        return False
    logit_E, left_E = logit_E.double(), torch.ones_like(logit_E, dtype=torch.bool)
    for expert in chosen:
        best = logit_E[expert]
        margin_E = best - logit_E - config.nearness * torch.maximum(logit_E.abs(), best)
        if bool(
            (margin_E.abs() <= (2 + config.nearness) * error)[left_E & (torch.arange(len(logit_E)) != expert)].any()
        ):
            return True
        left_E[expert] = False
    return False


def logit_errors(truth_TE: Tensor, eager_NTE: Tensor, scale_T: Tensor) -> Tensor:
    """Return by how much a row's logits may be off, [T]."""
    measured_T = (eager_NTE.double() - truth_TE.double()).abs().amax((0, -1))
    return 2 * measured_T + 2 * _EPS * scale_T


def _scores(logit_TE: Tensor, config: RouterConfig) -> Tensor:
    match config.score:
        case Score.SOFTMAX:
            return torch.softmax(logit_TE, -1)
        case Score.SIGMOID:
            return torch.sigmoid(logit_TE)
        case _:
            return logit_TE


def _group_scores(score_E: Tensor, allowed_E: Tensor, config: RouterConfig) -> tuple[Tensor, Tensor]:
    """Each group's score, the sum of its best two, and what it is allowed."""
    score_GE, allowed_GE = score_E.view(config.groups, -1), allowed_E.view(config.groups, -1)
    count = min(2, score_GE.shape[-1])
    return score_GE.topk(count, -1).values.sum(-1), count * allowed_GE.amax(-1)


def _groups_out(kept: set[int], score_E: Tensor, allowed_E: Tensor, config: RouterConfig) -> list[Judged]:
    group_G, allowed_G = _group_scores(score_E, allowed_E, config)
    others = set(range(config.groups)) - kept
    return [_pair(other, one, group_G, allowed_G) for one in kept for other in others]


def _experts_out(chosen: Sequence[int], kept: set[int], score_E: Tensor, allowed_E: Tensor, size: int) -> list[Judged]:
    left = [expert for group in kept for expert in range(group * size, (group + 1) * size) if expert not in chosen]
    return [_pair(other, one, score_E, allowed_E) for one in chosen for other in left]


def _pair(better: int, other: int, score: Tensor, allowed: Tensor) -> Judged:
    return Judged(float(score[better] - score[other]), float(allowed[better] + allowed[other]))


def _worst(judged: list[Judged]) -> Judged:
    return max(judged, key=lambda each: each.excess, default=Judged(-float("inf"), 0.0))
