"""Records of choosing the next token: next_token (greedy), draw.

Shapes: V vocabulary, T tokens so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...reference.logits import keep_min_p, keep_top_k, keep_top_p, penalize_repetition, scale_temperature
from ...reference.sampling import Sampling, draw, generator_for, next_token, shape_logits
from ..case import Case, Data, Inputs, Option, Picker
from ..guarantees import Discrete, Statistical
from ..op import Function, Op
from ..properties import repeats_itself, with_nan
from ..variants import changed
from .logits import HOST, LARGER_VOCABULARY, cases_of, logit_cases, logits, penalty_by_loop, previous, sorted_by_hand


def next_token_inputs(case: Case) -> Inputs:
    return {
        "logits_V": logits(case),
        "previous_T": previous(case),
        "sampling": Sampling(repetition_penalty=float(case.options["penalty"] or 1)),
        "generator": generator_for(case.seed, 0),
    }


def draw_inputs(case: Case) -> Inputs:
    """Any total; with a tail, one token has most of it, and all others are 3000 times rarer or more."""
    logits_V = logits(case)
    if case.options.get("tail"):
        likeliest = case.seed % case.n.V
        logits_V[likeliest] = logits_V.max() + 8
    total = float(case.options.get("total") or 1)
    return {"probability_V": total * torch.softmax(logits_V, -1), "generator": generator_for(case.seed, 0)}


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
    if shaped_V.isnan().any():
        raise ValueError("a logit is NaN")
    return int((shaped_V == shaped_V.max()).nonzero()[-1])


def _second_best(*, logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: Any) -> int:
    return sorted_by_hand(shape_logits(logits_V, previous_T, sampling))[min(1, len(logits_V) - 1)]


def _penalty_forgotten(inputs: Inputs) -> Inputs:
    return {"sampling": Sampling()}


def refuses_what_is_no_number(op: Op, function: Function, case: Case) -> None:
    """A logit or a probability that is NaN is refused: a model gone wrong must not seem to talk.

    The reference raises `NumericsError`; `with_nan` says what others may raise.
    """
    inputs = op.inputs(case)
    name = next(name for name in ("logits_V", "probability_V") if name in inputs)
    place = case.seed % case.n.V
    given = inputs[name].index_fill(0, torch.tensor([place]), torch.nan)
    token = with_nan(op, function, case, name, given)
    assert token is None, f"{name}[{place}] is NaN, and token {token} is chosen all the same"


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
    properties=(repeats_itself, refuses_what_is_no_number),
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


def _power_of_09(*, probability_V: Tensor, generator: torch.Generator) -> int:
    return draw(probability_V**0.9, generator)


def _total_taken_for_one(*, probability_V: Tensor, generator: torch.Generator) -> int:
    threshold = torch.rand((), dtype=torch.float64, generator=generator)
    place = torch.searchsorted(probability_V.double().cumsum(0), threshold, right=True)
    return int(place.clamp_max(len(probability_V) - 1))


def _rare_ones_never(*, probability_V: Tensor, generator: torch.Generator) -> int:
    """What is a thousand times rarer than the likeliest."""
    return draw(probability_V.where(probability_V >= 1e-3 * probability_V.max(), 0.0), generator)


def _first_half_likelier(*, probability_V: Tensor, generator: torch.Generator) -> int:
    """As a uniform number that is a little too small now and then."""
    biased_V = probability_V.clone()
    biased_V[: len(biased_V) // 2] *= 1.03
    return draw(biased_V, generator)


def _float16_running_sum(*, probability_V: Tensor, generator: torch.Generator) -> int:
    """Where the sum is near 1, what is rarer than 1/4096 is lost."""
    running_V = probability_V.half().cumsum(0, dtype=torch.float16)
    threshold = torch.rand((), dtype=torch.float64, generator=generator) * running_V[-1].double()
    return int(torch.searchsorted(running_V.double(), threshold, right=True))


def _bfloat16_probabilities(*, probability_V: Tensor, generator: torch.Generator) -> int:
    running_V = probability_V.bfloat16().cumsum(0, dtype=torch.bfloat16).double()
    threshold = torch.rand((), dtype=torch.float64, generator=generator) * running_V[-1]
    return int(torch.searchsorted(running_V, threshold, right=True))


def _more_draws(case: Case, pick: Picker) -> Case:
    """A vocabulary in which a single token is rare; now and then drawn from so often that each of them counts."""
    larger = LARGER_VOCABULARY(case, pick)
    if pick.integer(0, 15) < 15:
        return replace(larger, options={**larger.options, "samples": 300})
    sizes = {**larger.sizes, "V": pick.choice((1000, 2049, 4097))}
    return replace(larger, sizes=sizes, data=Data.NORMAL, options={**larger.options, "samples": 100_000, "tail": False})


def _more_samples(case: Case, pick: Picker) -> Case:
    larger = LARGER_VOCABULARY(case, pick)
    return replace(larger, options={**larger.options, "samples": 200})


DRAW = Op(
    name="draw",
    larger=_more_draws,
    paper="-",
    axes="V",
    reference=draw,
    outputs=("",),
    cases=cases_of("draw", total=[1.0, 0.25, 3.0], tail=[False, False, True]),
    inputs=draw_inputs,
    guarantee=Statistical(probability=_normalized, samples=40),
    properties=(repeats_itself, refuses_what_is_no_number),
    variants={"multinomial": _multinomial, "gumbel": _gumbel},
    mutants={
        "always_the_mode": _always_the_mode,
        "off_by_one": _off_by_one,
        "uniform": _uniform,
        "squared": _squared,
        "power_of_0.9": _power_of_09,
        "total_taken_for_one": _total_taken_for_one,
        "rare_ones_never": _rare_ones_never,
        "first_half_3_percent_likelier": _first_half_likelier,
        "float16_running_sum": _float16_running_sum,
        "bfloat16_probabilities": _bfloat16_probabilities,
    },
    flops=lambda n: n.V,
    bytes=lambda n: 4 * n.V,
    no_fast=HOST,
)


def sample_cases(pick: Picker) -> Case:
    """Logits without ties: which of two equal ones a filter keeps is for the filters' own records."""
    options: dict[str, Sequence[Option]] = {
        "temperature": [1.0, 0.6, 2.0],
        "top_k": [None, 2, 5, 20],
        "top_p": [None, 0.87, 0.37],
        "min_p": [None, 0.03, 0.3],
        "penalty": [1.0, 1.3],
    }
    return replace(logit_cases(pick, "sample", options), data=Data.NORMAL)


def sample_inputs(case: Case) -> Inputs:
    options: Any = case.options
    sampling = Sampling(
        temperature=options["temperature"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        min_p=options["min_p"],
        repetition_penalty=options["penalty"],
    )
    return {
        "logits_V": 2 * logits(case),
        "previous_T": previous(case),
        "sampling": sampling,
        "generator": generator_for(case.seed, 0),
    }


def _shaped_probability(exact: Inputs) -> Tensor:
    return torch.softmax(_shaped(exact), -1)


def _sampled_in_order(*order: str) -> Function:
    """Penalty, temperature and the filters, in an order of one's own."""

    def call(*, logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
        steps: dict[str, Callable[[Tensor], Tensor]] = {
            "penalty": lambda x: penalize_repetition(x, previous_T, sampling.repetition_penalty),
            "temperature": lambda x: scale_temperature(x, sampling.temperature),
            "top_k": lambda x: x if sampling.top_k is None else keep_top_k(x, sampling.top_k),
            "top_p": lambda x: x if sampling.top_p is None else keep_top_p(x, sampling.top_p),
            "min_p": lambda x: x if sampling.min_p is None else keep_min_p(x, sampling.min_p),
        }
        for name in order:
            logits_V = steps[name](logits_V)
        return _multinomial(probability_V=torch.softmax(logits_V, -1), generator=generator)

    return call


def _always_the_likeliest(*, logits_V: Tensor, previous_T: Tensor, sampling: Sampling, generator: Any) -> int:
    return int(shape_logits(logits_V, previous_T, sampling).argmax())


SAMPLE = Op(
    name="sample",
    paper="-",
    axes="V T",
    reference=next_token,
    outputs=("",),
    cases=sample_cases,
    inputs=sample_inputs,
    larger=_more_samples,
    guarantee=Statistical(probability=_shaped_probability, samples=20),
    properties=(repeats_itself, refuses_what_is_no_number),
    variants={"multinomial": _sampled_in_order("penalty", "temperature", "top_k", "top_p", "min_p")},
    mutants={
        "always_the_likeliest": _always_the_likeliest,
        "temperature_last": _sampled_in_order("penalty", "top_k", "top_p", "min_p", "temperature"),
        "top_p_before_top_k": _sampled_in_order("penalty", "temperature", "top_p", "top_k", "min_p"),
        "min_p_first": _sampled_in_order("penalty", "temperature", "min_p", "top_k", "top_p"),
        "penalty_forgotten": _sampled_in_order("temperature", "top_k", "top_p", "min_p"),
        "temperature_forgotten": _sampled_in_order("penalty", "top_k", "top_p", "min_p"),
        "min_p_forgotten": _sampled_in_order("penalty", "temperature", "top_k", "top_p"),
        "top_p_forgotten": _sampled_in_order("penalty", "temperature", "top_k", "min_p"),
        "top_k_forgotten": _sampled_in_order("penalty", "temperature", "top_p", "min_p"),
    },
    flops=lambda n: 10 * n.V,
    bytes=lambda n: 4 * n.V + 8 * n.T,
    no_fast=HOST,
)
