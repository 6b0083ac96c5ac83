"""The guarantees of routers, and of what they steer: choices are decisions, and numbers follow the choices made.

A router's result is judged in two steps. Its experts must be those that the float64 scores rank highest, but for scores
within the sum of both budgets (`routes.judge_choice`), and equal logits go to the lower index. Its weights are held by
budget against those that the reference gives the very experts that were chosen.

A whole block is judged on the truth's choices, or on those that the candidate reports. Of one that reports none, tokens
of which another choice would be right as well are left out and counted.

Shapes: T tokens, E experts, K chosen, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..reference.routing import choice_weights
from ..spec.moe import RouterConfig, Score
from .budget import Budget, Sizes, judge_elements
from .case import Data, Inputs
from .routes import Forced, allowed_scores, judge_choice, logit_errors, on_an_edge, ranking
from .scale_routing import score_sizes, weight_sizes
from .trial import Arithmetic, Trial, Verdict, failure

_EPS = torch.finfo(torch.float32).eps
_COUNTS_FOR_NOTHING = 1e-30
"""A weight so small that it does not matter whose it is: the best expert's is 1 / E at least."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A router's experts, equal but for near-ties, and their weights, by budget on what was chosen.

    The op takes logit_TE, config and choice_bias_E, and returns expert_TK and weight_TK.
    """

    lower_index: bool = True
    """Whether of experts with equal logits the lower index must be chosen."""
    best_first: bool = True
    """Whether a token's experts must fall by score."""

    def judge(self, trial: Trial) -> Verdict:
        misfit = trial.misfit()
        if misfit is not None:
            return misfit
        config: RouterConfig = trial.inputs["config"]
        expert_TK, weight_TK = trial.got
        wrong = misnamed(expert_TK, config) or self._wrong_choice(trial, expert_TK, config)
        if wrong is not None:
            return failure(wrong)
        logit_TE = trial.exact_inputs["logit_TE"]
        truth_TK = choice_weights(logit_TE, expert_TK, config)
        given_TE = trial.inputs["logit_TE"]
        eager_TK = choice_weights(given_TE.to(torch.promote_types(given_TE.dtype, torch.float32)), expert_TK, config)
        edge_T = torch.tensor(
            [
                on_an_edge(logit_E, 2 * _EPS * float(logit_E.abs().max()), chosen, config)
                for logit_E, chosen in zip(logit_TE, expert_TK.tolist(), strict=True)
            ]
        )
        sizes = weight_sizes(logit_TE, expert_TK, config)
        sizes = replace(sizes, wide=sizes.wide.masked_fill(edge_T[:, None], torch.inf))
        verdict = judge_elements(Budget(rows="T"), trial.outputs[1], weight_TK, eager_TK, truth_TK, sizes)
        return replace(verdict, left_out=int(edge_T.sum()))

    def _wrong_choice(self, trial: Trial, expert_TK: Tensor, config: RouterConfig) -> str | None:
        """Return what is wrong with the first token whose experts no tie explains."""
        logit_TE, bias_E = trial.exact_inputs["logit_TE"], trial.exact_inputs["choice_bias_E"]
        expected_TK, true_TK = trial.eager[0], trial.truth[0]
        differs_T = (expert_TK != expected_TK).any(-1) & (expert_TK != true_TK).any(-1)
        if not differs_T.any():
            return None
        spaces = _score_spaces(logit_TE, config, bias_E)
        for token in differs_T.nonzero()[:, 0].tolist():
            chosen, best = expert_TK[token].tolist(), true_TK[token].tolist()
            where = f"token {token}: experts {chosen} instead of {best}"
            of_token = [(score_TE[token], allowed_TE[token]) for score_TE, allowed_TE in spaces]
            wrong = [_wrongly_ranked(chosen, *each, config, ordered=self.best_first) for each in of_token]
            if all(wrong):
                return f"{where}; {wrong[0]}"
            key_E = logit_TE[token] if bias_E is None else torch.complex(logit_TE[token], bias_E)
            tied = _against_the_rule(chosen, key_E, config, ordered=self.best_first)
            if self.lower_index and tied is not None:
                return f"{where}: of equal experts {tied[0]} and {tied[1]} the higher index goes first"
        return None


def _score_spaces(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Return the scores by which experts may be ranked, each with what rounding may change, logits being given.

    A softmax over the chosen ranks by logits, or, as public code does, by a softmax over all, in which more is equal.
    """
    least = torch.finfo(torch.float32).smallest_normal
    score_TE = ranking(logit_TE, config, bias_E)
    size_TE = score_sizes(logit_TE, config.score)
    if bias_E is not None:
        size_TE = size_TE + bias_E.abs() + score_TE.abs()
    spaces = [(score_TE, 2 * _EPS * size_TE + least)]
    if config.score is Score.SOFTMAX_OF_CHOSEN and config.kept_groups == config.groups:
        spaces.append((torch.softmax(logit_TE, -1), 2 * _EPS * score_sizes(logit_TE, Score.SOFTMAX) + least))
    return spaces


def _wrongly_ranked(
    chosen: list[int], score_E: Tensor, allowed_E: Tensor, config: RouterConfig, *, ordered: bool
) -> str | None:
    """Return what is wrong with the choice by these scores."""
    judged = judge_choice(chosen, score_E, allowed_E, config)
    if not judged.gap <= judged.allowed:
        return f"their scores are {judged.gap:.3g} apart, and {judged.allowed:.3g} is allowed"
    for first, second in pairwise(chosen) if ordered else ():
        gap = float(score_E[second] - score_E[first])
        if not gap <= float(allowed_E[first] + allowed_E[second]):
            return f"expert {second} comes after {first}, and its score is larger by {gap:.3g}"
    return None


def misnamed(expert_TK: Tensor, config: RouterConfig) -> str | None:
    """Return what is wrong with experts that do not exist, or come twice."""
    for token, chosen in enumerate(expert_TK.tolist()):
        if len(set(chosen)) < len(chosen) or not all(0 <= each < config.experts for each in chosen):
            return f"token {token}: experts {chosen}; they must differ and lie in 0 .. {config.experts - 1}"
    return None


def _against_the_rule(
    chosen: list[int], key_E: Tensor, config: RouterConfig, *, ordered: bool
) -> tuple[int, int] | None:
    """Return two experts, or the first ones of two groups, with equal keys of which the higher index was preferred."""
    size = config.experts // config.groups
    needed = {expert // size for expert in chosen}
    keys = key_E.tolist()
    for place, one in enumerate(chosen):
        for other in range(one):
            open_to_it = config.kept_groups == config.groups or other // size in needed
            if keys[other] == keys[one] and open_to_it and other not in (chosen[:place] if ordered else chosen):
                return other, one
    if config.kept_groups < config.groups:
        best = [sorted(map(str, keys[group * size : (group + 1) * size])) for group in range(config.groups)]
        for group in needed:
            for other in set(range(group)) - needed:
                if best[other] == best[group]:
                    return other * size, group * size
    return None


@dataclass(frozen=True, kw_only=True)
class Steered:
    """A result by budget, on experts that are chosen as the truth chooses, or as the candidate reports.

    A candidate may return the experts of each token, int64 [T, K], after the result.
    """

    routed: Callable[[Forced], Callable[..., Any]]
    """The reference, with another `route` component."""
    scale: Callable[[Inputs, Tensor, Tensor], list[Sizes]]
    """From the float64 inputs, the experts chosen and the error of each token's logits: the sizes of each output."""
    logit_scale: Callable[[Inputs], Tensor]
    """The sizes of what is summed in each router logit, [T, E]."""
    rows: str
    lower_index: bool = True
    """Whether of experts with equal logits the lower index is chosen, where logits are exact."""

    def judge(self, trial: Trial) -> Verdict:
        steering = _Steering(self.routed)
        reported: list[Tensor] = []
        steered = replace(trial, reference=steering, candidate=_splitting(trial.candidate, reported))
        _ = steered.truth, steered.eager, steered.got
        (logit_TE, config, bias_E, chosen_TK), eager_TE = steering.calls[0], steering.calls[1][0]
        place = 0 if trial.once else 1  # the calls before and after are on other values
        told_TK = reported[place] if len(reported) > place else None
        scale_T = self.logit_scale(trial.sized_inputs).amax(-1)
        error_T = logit_errors(logit_TE, eager_TE[None], scale_T)
        if config.score is Score.SOFTMAX_OF_CHOSEN:
            error_T = error_T + 4 * _EPS  # who ranks by a softmax over all rounds that
        if trial.arithmetic is Arithmetic.NARROW:
            error_T = error_T + 2 * torch.finfo(trial.case.dtype).eps * scale_T
        if steered.misfit() is None and told_TK is not None and not torch.equal(told_TK, chosen_TK):
            wrong = self._inadmissible(told_TK, steering.calls[0], error_T)
            if wrong is not None:
                return failure(wrong)
            steering = _Steering(self.routed, [told_TK])
            chosen_TK = told_TK
            steered = replace(steered, reference=steering)
        exact_T = torch.zeros_like(error_T, dtype=torch.bool)
        if self.lower_index and trial.case.data in (Data.INTEGER, Data.ZEROS):
            exact_T = (eager_TE.double() == logit_TE).all(-1)
        left_T = torch.tensor(
            [
                on_an_edge(logit_E, float(error), chosen, config)
                for logit_E, error, chosen in zip(logit_TE, error_T, chosen_TK.tolist(), strict=True)
            ]
        )
        if told_TK is None:
            left_T = left_T | nearly_tied(logit_TE, error_T, config, bias_E, chosen_TK, exact_T)
        count = 0

        def scale(exact: Inputs, _: list[Tensor]) -> list[Sizes]:
            nonlocal count
            sizes = self.scale(exact, chosen_TK, error_T)
            left = left_T.any().expand_as(left_T) if trial.inputs["config"].capacity is not None else left_T
            wides = [each.wide.masked_fill(left.view(*each.wide.shape[:-1], 1), torch.inf) for each in sizes]
            count = int(wides[0].isinf().all(-1).sum())
            return [replace(each, wide=wide) for each, wide in zip(sizes, wides, strict=True)]

        verdict = Budget(rows=self.rows, scale=scale).judge(steered)
        return replace(verdict, left_out=count)

    def _inadmissible(self, expert_TK: Tensor, call: tuple[Any, ...], error_T: Tensor) -> str | None:
        """Return what is wrong with reported experts that no tie explains."""
        logit_TE, config, bias_E, best_TK = call
        if expert_TK.shape != best_TK.shape:
            return f"reports experts of shape {list(expert_TK.shape)}, and {list(best_TK.shape)} were chosen"
        wrong = misnamed(expert_TK, config)
        score_TE, allowed_TE = ranking(logit_TE, config, bias_E), allowed_scores(logit_TE, error_T, config, bias_E)
        for token, (chosen, best) in enumerate(zip(expert_TK.tolist(), best_TK.tolist(), strict=True)):
            if wrong is None and chosen != best:
                judged = judge_choice(chosen, score_TE[token], allowed_TE[token], config)
                if not judged.gap <= judged.allowed:
                    apart = f"their scores are {judged.gap:.3g} apart, and {judged.allowed:.3g} is allowed"
                    wrong = f"token {token}: experts {chosen} instead of {best}; {apart}"
        return wrong


def nearly_tied(
    logit_TE: Tensor,
    error_T: Tensor,
    config: RouterConfig,
    bias_E: Tensor | None,
    best_TK: Tensor,
    exact_T: Tensor,
) -> Tensor:
    """Return, for each token, whether exchanging one expert or one group would be right as well, boolean [T].

    Where logits are exact, equal ones have a rule and are no near-tie; nor are experts that do not count.
    """
    error_T = error_T.where(~exact_T, 0.0)
    score_TE = ranking(logit_TE, config, bias_E)
    allowed_TE = allowed_scores(logit_TE, error_T, config, bias_E)
    best_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, best_TK, True)
    key_TE = logit_TE if bias_E is None else torch.complex(logit_TE, bias_E.expand_as(logit_TE))
    group_TGE = score_TE.view(len(score_TE), config.groups, -1)
    count = min(2, group_TGE.shape[-1])
    group_TG = group_TGE.topk(count, -1).values.sum(-1)
    order_TG = group_TG.argsort(dim=-1, descending=True, stable=True)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(1, order_TG[:, : config.kept_groups], True)
    left_TE = kept_TG.repeat_interleave(group_TGE.shape[-1], 1) & ~best_TE
    near_TKE = _close(score_TE.gather(1, best_TK), score_TE, allowed_TE.gather(1, best_TK), allowed_TE)
    ruled_TKE = (key_TE.gather(1, best_TK)[:, :, None] == key_TE[:, None, :]) & exact_T[:, None, None]
    if config.score is Score.SOFTMAX and bias_E is None:
        ruled_TKE = ruled_TKE | (score_TE.gather(1, best_TK) < _COUNTS_FOR_NOTHING)[:, :, None]
    near_T = (near_TKE & left_TE[:, None, :] & ~ruled_TKE).any(-1).any(-1)
    if config.kept_groups < config.groups:
        allowed_TG = count * allowed_TE.view_as(group_TGE).amax(-1)
        near_TGG = _close(group_TG, group_TG, allowed_TG, allowed_TG)
        near_T = near_T | (near_TGG & kept_TG[:, :, None] & ~kept_TG[:, None, :]).any(-1).any(-1)
    if config.score is Score.SPARSEMIXER:
        score_TK, allowed_TK = score_TE.gather(1, best_TK), allowed_TE.gather(1, best_TK)
        near_T = near_T | (score_TK[:, :-1] - score_TK[:, 1:] <= allowed_TK[:, :-1] + allowed_TK[:, 1:]).any(-1)
    return near_T


def _close(one: Tensor, other: Tensor, allowed_one: Tensor, allowed_other: Tensor) -> Tensor:
    """Compare every one with every other, [T, ones, others]."""
    return one[:, :, None] - other[:, None, :] <= allowed_one[:, :, None] + allowed_other[:, None, :]


class _Steering:
    """The reference on choices that are given, or on those that its first call makes."""

    def __init__(self, routed: Callable[[Forced], Callable[..., Any]], choices: list[Tensor] | None = None) -> None:
        self.routed = routed
        self.choices = choices
        self.calls: list[tuple[Tensor, RouterConfig, Tensor | None, Tensor]] = []

    def __call__(self, **inputs: Any) -> Any:
        forced = Forced(list(self.choices or []))
        out = self.routed(forced)(**inputs)
        self.calls += forced.calls
        self.choices = [call[3] for call in forced.calls]
        return out


def _splitting(candidate: Callable[..., Any], reported: list[Tensor]) -> Callable[..., Any]:
    """The candidate without the experts that it reports after its result."""

    def call(**inputs: Any) -> Any:
        out = candidate(**inputs)
        if isinstance(out, tuple | list) and len(out) == 2 and out[1].dtype is torch.int64:
            reported.append(out[1].detach().cpu())
            return out[0]
        return out

    return call
