"""Decisions inside a model: what a tie explains is forced and told, what none explains is the fault."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.model_mutants import Changed
from twinfer.oracle.models import RandomSource, draw_model_config, draw_moe
from twinfer.oracle.paths import PathComparison, compare_paths
from twinfer.oracle.routes import allowed_scores, judge_choice, nearest_call, ranking
from twinfer.oracle.schedule import generation
from twinfer.reference.components import DEFAULT
from twinfer.reference.path import ReferencePath
from twinfer.reference.routing import Routing, choice_weights, route
from twinfer.spec.config import MlpConfig
from twinfer.spec.decoder import Decoder
from twinfer.spec.moe import RouterConfig, Score, router
from twinfer.spec.weights import LayerWeights, LinearWeights, MoeWeights, WeightSource

EXACT = 1e-9


FAMILIES: dict[str, dict[str, int]] = {
    "qwen3-moe": {},
    "deepseek-v3": {},
    "deepseek-v3 in groups": {"groups": 3, "kept_groups": 2},
    "gpt-oss": {},
    "mixtral": {},
    "phimoe": {},
}
"""A recipe of each family: softmax, sigmoid with a bias for the choice, the same in groups, logits then softmax with
and without a bias of the logits, and SparseMixer."""


def source_of(
    top_k: int = 2,
    *,
    tied: bool = False,
    apart: float = 0.0,
    recipe: str = "mixtral",
    groups: int = 1,
    kept_groups: int = 1,
) -> WeightSource:
    """Two layers, the second with six experts; of `tied` ones 0 and 1, 2 and 3, 4 and 5 score (nearly) the same."""
    config = replace(draw_model_config(RandomPicker(0)), vocabulary=12)
    mlp = config.layers[0].mlp
    assert isinstance(mlp, MlpConfig)
    mixture = draw_moe(RandomPicker(1), mlp)
    of_recipe = router(recipe.partition(" ")[0], experts=6, top_k=top_k, groups=groups, kept_groups=kept_groups)
    mixture = replace(mixture, router=of_recipe)
    config = replace(config, layers=(config.layers[0], replace(config.layers[0], mlp=mixture)))

    def layer(index: int, weights: LayerWeights) -> LayerWeights:
        if not tied or not isinstance(weights.mlp, MoeWeights):
            return weights
        one, bias_E = weights.mlp.router, weights.mlp.choice_bias_E
        both = LinearWeights(weight_NI=in_pairs(one.weight_NI, apart), bias_N=in_pairs(one.bias_N, apart))
        return replace(weights, mlp=replace(weights.mlp, router=both, choice_bias_E=in_pairs(bias_E, apart)))

    return Changed(RandomSource(config, 4), layer=layer)


def in_pairs(of_E: Any, apart: float) -> Any:
    """The same of every second expert as of the one before it, times 1 + apart."""
    return None if of_E is None else torch.stack([of_E[::2], of_E[::2] * (1 + apart)], 1).flatten(0, 1)


def choosing(swap: dict[int, int], when: int | None = None) -> Any:
    """A router that takes another expert for some; `when` is the rank of the choice that is exchanged."""

    def other(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None = None, /) -> Routing:
        own_TK = route(logit_TE, config, bias_E).expert_TK
        if when is None:
            chosen = [[swap.get(expert, expert) for expert in row] for row in own_TK.tolist()]
        else:
            ranked = route(logit_TE, replace(config, top_k=config.experts), bias_E).expert_TK
            chosen = [[*row[: config.top_k - 1], row[when]] for row in ranked.tolist()]
        valid = [new if len(set(new)) == len(new) else old for new, old in zip(chosen, own_TK.tolist(), strict=True)]
        expert_TK = torch.tensor(valid).view_as(own_TK)
        return Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))

    return replace(DEFAULT, route=other)


class Silent:
    """A path without its report."""

    max_batch = None

    def __init__(self, path: ReferencePath) -> None:
        self._path = path
        self.config, self.device = path.config, path.device
        self.open, self.extend = path.open, path.extend


def compared(source: WeightSource, candidate: Any, compute: torch.dtype = torch.float32) -> PathComparison:
    baseline = Baseline.of(source, compute=compute, runs=3)
    given: Decoder = candidate
    return compare_paths(baseline, given, generation(((1, 2, 3, 4, 5, 6), (7, 8, 9)), 3))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_a_flip_within_the_bound_raises_no_alarm_and_is_told(compute: torch.dtype) -> None:
    """The best two tie for every token: a path that takes the higher index is forced, not failed."""
    source = source_of(top_k=1, tied=True)
    path = ReferencePath(source, compute=compute, components=choosing({0: 1, 2: 3, 4: 5}))
    seen = compared(source, path, compute)
    assert seen.holds, seen.failures
    assert seen.left_out == 0
    assert len(seen.route_ties) == seen.choices, "every token flips"
    for tie in seen.route_ties:
        (best,), (chosen,) = tie.best, tie.chosen or ()
        assert f"experts [{best + 1}] instead of [{best}]; their scores are 0 apart" in str(tie)
        assert chosen == best + 1
    assert seen.choices == 6 + 3 + 4


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_a_flip_beyond_the_bound_is_the_fault(compute: torch.dtype) -> None:
    """The third best expert instead of the second: layer, position, both sets, gap and bound are named."""
    source = source_of()
    seen = compared(source, ReferencePath(source, compute=compute, components=choosing({}, when=2)), compute)
    assert "a choice of experts that no tie explains: step 1, sequence" in seen.failures[0]
    assert "layer 1: experts [" in seen.failures[0]
    assert "is allowed" in seen.failures[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flip_of_every_recipe_is_told_within_its_bound_and_is_the_fault_beyond(family: str) -> None:
    """In a whole model: every token may exchange experts that nearly tie; none may take the next best."""
    tied = source_of(top_k=1, tied=True, apart=2**-23, recipe=family, **FAMILIES[family])
    seen = compared(tied, ReferencePath(tied, components=choosing({0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4})))
    assert seen.holds, seen.failures
    assert (seen.choices, seen.left_out) == (13, 0), "every choice is judged"
    assert len(seen.route_ties) > 6, "most tokens flip: some float32 scores tie where the truth's do not"
    assert any(tie.gap != 0 for tie in seen.route_ties)
    source = source_of(recipe=family, **FAMILIES[family])
    seen = compared(source, ReferencePath(source, components=flipping_once()))
    (fault,) = seen.failures
    assert "a choice of experts that no tie explains: step 1, sequence 1, position 2, layer 1: experts [" in fault


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bound_is_no_wider_than_rounding_explains(family: str) -> None:
    """Scores a thousandth apart are up to ten thousand times their bound, so exchanging those experts is the fault."""
    source = source_of(top_k=1, tied=True, apart=2**-10, recipe=family, **FAMILIES[family])
    seen = compared(source, ReferencePath(source, components=flipping_once()))
    (fault,) = seen.failures
    found = re.search(r"their scores are (\S+) apart, and (\S+) is allowed", fault)
    assert found is not None, fault
    gap, allowed = map(float, found.groups())
    assert 1 < gap / allowed < 1e4, fault


def flipping_once() -> Any:
    """A router that, for the last token of the second sequence, exchanges its last choice for the nearest other."""

    def other(logit_TE: Tensor, config: RouterConfig, bias_E: Tensor | None = None, /) -> Routing:
        expert_TK = route(logit_TE, config, bias_E).expert_TK.clone()
        if len(logit_TE) == 3:
            size = config.experts // config.groups
            open_to = {expert // size for expert in expert_TK[-1].tolist()}
            score_E = ranking(logit_TE, config, bias_E)[-1]
            left = [each for each in score_E.argsort(descending=True).tolist() if each // size in open_to]
            expert_TK[-1, -1] = next(each for each in left if each not in expert_TK[-1].tolist())
        return Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))

    return replace(DEFAULT, route=other)


def test_rows_behind_a_near_tie_of_a_silent_path_are_left_out() -> None:
    """And only those: a silent path without ties is judged in every row."""
    tied, plain = source_of(top_k=1, tied=True), source_of()
    for source, components in ((tied, choosing({0: 1, 2: 3, 4: 5})), (plain, DEFAULT)):
        seen = compared(source, Silent(ReferencePath(source, components=components)))
        assert seen.holds, seen.failures
        assert (seen.left_out > 0) == (source is tied)
        assert seen.rows + seen.left_out == 6 + 3 + 4
        assert seen.choices == 0


def test_a_silent_flip_beyond_the_bound_shows_in_the_rows() -> None:
    source = source_of()
    seen = compared(source, Silent(ReferencePath(source, components=choosing({}, when=2))))
    assert "times what the budget allows" in seen.failures[0]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda each: each[:, :1], "routes are [6, 1] of torch.int64, not [6, 2]"),
        (lambda each: each.int(), "of torch.int32"),
        (lambda each: each * 0, "name experts [0, 0]; they must differ"),
        (lambda each: each + 9, "lie in 0 .. 5"),
    ],
)
def test_reports_of_another_form_are_refused(change: Any, complaint: str) -> None:
    class Changing(ReferencePath):
        def extend(self, *given: Any, **options: Any) -> Any:
            out = super().extend(*given, **options)
            self.routes = [[change(each) for each in layers] for layers in self.routes]
            return out

    source = source_of()
    assert complaint in compared(source, Changing(source)).failures[0]


def judged(chosen: Sequence[int], score: Sequence[float], config: RouterConfig, allowed: float = 0.05) -> bool:
    score_E = torch.tensor(score, dtype=torch.float64)
    call = judge_choice(chosen, score_E, torch.full_like(score_E, allowed), config)
    return call.gap <= call.allowed


def test_groups_are_decisions_too() -> None:
    """Four groups of two: a tie of groups excuses, a worse group does not, nor more groups than may be kept."""
    config = RouterConfig(experts=8, top_k=2, score=Score.SIGMOID, groups=4, kept_groups=1)
    score = [0.5, 0.4, 0.45, 0.44, 0.1, 0.1, 0.8, 0.0]
    assert judged([0, 1], score, config)
    assert judged([2, 3], score, config), "0.89 and 0.9: the groups tie"
    assert not judged([4, 5], score, config)
    assert not judged([0, 2], score, config)
    two = replace(config, kept_groups=2)
    assert judged([0, 2], [0.5, 0.4, 0.47, 0.4, 0.1, 0.1, 0.3, 0.0], two)
    assert not judged([0, 6], [0.5, 0.4, 0.47, 0.4, 0.1, 0.1, 0.3, 0.0], two)


@pytest.mark.parametrize("score", list(Score))
def test_what_a_score_is_allowed_covers_any_error_of_the_logits(score: Score) -> None:
    """Logits moved by up to `error`, each as it likes: no score moves further than allowed."""
    config = RouterConfig(experts=6, top_k=2, score=score, nearness=0.02 if score is Score.SPARSEMIXER else None)
    generator = torch.Generator().manual_seed(0)
    logit_TE = 3 * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    error_T = torch.rand(200, generator=generator, dtype=torch.float64)
    moved_TE = logit_TE + error_T[:, None] * (2 * torch.randint(0, 2, (200, 6), generator=generator) - 1)

    def scores(logits: Tensor) -> Tensor:
        match score:
            case Score.SOFTMAX:
                return torch.softmax(logits, -1)
            case Score.SIGMOID:
                return torch.sigmoid(logits)
        return logits

    ratio_TE = (scores(moved_TE) - scores(logit_TE)).abs() / allowed_scores(logit_TE, error_T, config, None)
    assert 0.9 < float(ratio_TE.max()) <= 1 + EXACT


def test_the_nearest_call_is_found() -> None:
    score_E = torch.tensor([0.5, 0.1, 0.4, 0.39], dtype=torch.float64)
    call = nearest_call(score_E, torch.full_like(score_E, 0.01), RouterConfig(experts=4, top_k=2), [0, 2])
    assert call.gap == pytest.approx(0.01)
