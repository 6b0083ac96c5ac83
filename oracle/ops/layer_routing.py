"""Layers with experts are judged where their routers decide: a near-tie is rejected, as what says nothing.

Attention stands before a router, so its logits are off by what both round. A choice counts as decided if it holds
where each logit is off by 8 times what an eager run's are, and 8 eps(float32) of the largest.

Shapes: T tokens, E experts.
"""

from dataclasses import dataclass, replace
from typing import Any

from ...reference.components import DEFAULT
from ...reference.layer import layer
from ...spec.moe import MoeConfig
from ..budget import Budget
from ..case import Inputs
from ..routes import Forced, allowed_scores, logit_errors, nearest_call, on_an_edge, ranking
from ..trial import Status, Trial, Verdict

_MARGIN = 4
"""Times what `logit_errors` allows."""


@dataclass(frozen=True, kw_only=True)
class DecidedBudget(Budget):
    """A budget of results behind a router, on cases in which rounding cannot change its choices."""

    def judge(self, trial: Trial) -> Verdict:
        verdict = super().judge(trial)
        if verdict.failed and trial.misfit() is None and not decided(trial):
            return Verdict(status=Status.REJECTED)
        return verdict


def decided(trial: Trial) -> bool:
    """Whether no router's choice of the truth is nearly a tie."""
    config = trial.inputs["config"].mlp
    if not isinstance(config, MoeConfig):
        return True
    (logit_TE, router, bias_E, chosen_TK), (eager_TE, *_) = (_call(each) for each in (trial.exact_inputs, trial.inputs))
    error_T = _MARGIN * logit_errors(logit_TE, eager_TE[None], logit_TE.abs().amax(-1))
    score_TE = ranking(logit_TE, router, bias_E)
    allowed_TE = allowed_scores(logit_TE, error_T, router, bias_E)
    return not any(
        nearest_call(score_TE[token], allowed_TE[token], router, chosen).admissible
        or on_an_edge(logit_TE[token], float(error_T[token]), chosen, router)
        for token, chosen in enumerate(chosen_TK.tolist())
    )


def _call(inputs: Inputs) -> Any:
    """What the layer's router was asked, and what it chose."""
    forced = Forced()
    layer(inputs["x_BTM"], inputs["weights"], inputs["config"], inputs["cache"], replace(DEFAULT, route=forced))
    return forced.calls[0]
