"""Records of choosing the next token: next_token (greedy), draw.

Shapes: V vocabulary, T tokens so far.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference.sampling import Sampling, draw, generator_for, next_token, shape_logits
from ..case import Case, Inputs, Picker
from ..guarantees import Discrete, Statistical
from ..op import Op
from ..properties import repeats_itself
from ..variants import changed
from .logits import HOST, LARGER_VOCABULARY, cases_of, logits, penalty_by_loop, previous, sorted_by_hand


def next_token_inputs(case: Case) -> Inputs:
    return {
        "logits_V": logits(case),
        "previous_T": previous(case),
        "sampling": Sampling(repetition_penalty=float(case.options["penalty"] or 1)),
        "generator": generator_for(case.seed, 0),
    }


def draw_inputs(case: Case) -> Inputs:
    return {"probability_V": torch.softmax(logits(case), -1), "generator": generator_for(case.seed, 0)}


def _shaped(exact: Inputs) -> Tensor:
    return shape_logits(exact["logits_V"], exact["previous_T"], exact["sampling"])


def _greedy_regret(exact: Inputs, got: list[Tensor]) -> Tensor:
    shaped_V = _shaped(exact)
    token = int(got[0])
    if not 0 <= token < len(shaped_V):
        return torch.tensor(torch.inf)
    return shaped_V.max() - shaped_V[token]


def _greedy_scale(exact: Inputs) -> Tensor:
    return _shaped(exact).abs().max()


def _greedy_by_hand(*, logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: Any) -> int:
    return sorted_by_hand(
        penalty_by_loop(logits_V=logits_V, previous_T=previous_T, penalty=sampling.repetition_penalty)
    )[0]


def _greedy_last_of_ties(*, logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: Any) -> int:
    shaped_V = shape_logits(logits_V, previous_T, sampling)
    return int((shaped_V == shaped_V.max()).nonzero()[-1])


def _second_best(*, logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: Any) -> int:
    return sorted_by_hand(shape_logits(logits_V, previous_T, sampling))[min(1, len(logits_V) - 1)]


def _penalty_forgotten(inputs: Inputs) -> Inputs:
    return {"sampling": Sampling()}


NEXT_TOKEN = Op(
    name="next_token",
    larger=LARGER_VOCABULARY,
    paper="-",
    axes="V T",
    reference=next_token,
    outputs=("",),
    cases=cases_of("next_token", penalty=[1.0, 1.3, 2.0]),
    inputs=next_token_inputs,
    guarantee=Discrete(regret=_greedy_regret, scale=_greedy_scale),
    properties=(repeats_itself,),
    variants={"by_hand": _greedy_by_hand},
    mutants={
        "ties_to_the_higher_id": _greedy_last_of_ties,
        "second_best": _second_best,
        "penalty_forgotten": changed(next_token, _penalty_forgotten),
    },
    flops=lambda n: n.V,
    bytes=lambda n: 4 * n.V,
    no_fast=HOST,
    conventions={
        "ties=any": {"guarantee": Discrete(regret=_greedy_regret, scale=_greedy_scale, exact_on_integers=False)}
    },
)


def _normalized(exact: Inputs) -> Tensor:
    probability_V: Tensor = exact["probability_V"]
    return probability_V / probability_V.sum()


def _multinomial(*, probability_V: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probability_V, 1, generator=generator))


def _gumbel(*, probability_V: Tensor, generator: torch.Generator) -> int:
    """The largest of log p plus Gumbel noise."""
    uniform_V = torch.rand(probability_V.shape, dtype=torch.float64, generator=generator)
    return int((probability_V.double().log() - torch.log(-torch.log(uniform_V))).argmax())


def _always_the_mode(*, probability_V: Tensor, generator: torch.Generator) -> int:
    return int(probability_V.argmax())


def _off_by_one(*, probability_V: Tensor, generator: torch.Generator) -> int:
    return min(draw(probability_V, generator) + 1, len(probability_V) - 1)


def _uniform(*, probability_V: Tensor, generator: torch.Generator) -> int:
    return int(torch.randint(len(probability_V), (), generator=generator))


def _squared(*, probability_V: Tensor, generator: torch.Generator) -> int:
    return draw(probability_V**2, generator)


def _many_draws(case: Case, pick: Picker) -> Case:
    """A vocabulary in which a single token is rare, drawn from often."""
    larger = LARGER_VOCABULARY(case, pick)
    return replace(larger, options={**larger.options, "samples": 1500})


DRAW = Op(
    name="draw",
    larger=_many_draws,
    paper="-",
    axes="V",
    reference=draw,
    outputs=("",),
    cases=cases_of("draw"),
    inputs=draw_inputs,
    guarantee=Statistical(probability=_normalized, samples=60),
    properties=(repeats_itself,),
    variants={"multinomial": _multinomial, "gumbel": _gumbel},
    mutants={
        "always_the_mode": _always_the_mode,
        "off_by_one": _off_by_one,
        "uniform": _uniform,
        "squared": _squared,
    },
    flops=lambda n: n.V,
    bytes=lambda n: 4 * n.V,
    no_fast=HOST,
)
