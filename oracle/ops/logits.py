"""Records of the logit processors.

Shapes: V vocabulary, T tokens so far.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...reference.logits import keep_min_p, keep_top_k, keep_top_p, penalize_repetition, scale_temperature
from ..budget import Budget
from ..case import Case, Data, Inputs, Option, Picker, activations
from ..guarantees import Bitwise, Discrete
from ..op import Function, Op
from ..properties import repeats_itself, with_nan
from ..sizes import VOCABULARY, resized
from ..variants import changed

_KINDS = (Data.NORMAL, Data.LARGE, Data.CONSTANT, Data.ZEROS, Data.TIES, Data.OFFSET, Data.INTEGER)
HOST = "runs on the host, on one row of logits, the same for every path: there is no fast twin"


LARGER_VOCABULARY = resized({"V": VOCABULARY, "T": (16, 17, 64, 65, 129)})


def logit_cases(pick: Picker, op: str, options: dict[str, Sequence[Option]]) -> Case:
    return Case(
        op=op,
        sizes={"V": pick.integer(1, 30), "T": pick.integer(1, 6)},
        options={name: pick.choice(values) for name, values in options.items()},
        data=pick.choice(_KINDS),
        seed=pick.integer(0, 2**31),
    )


def cases_of(op: str, **options: Sequence[Option]) -> Callable[[Picker], Case]:
    return partial(logit_cases, op=op, options=options)


def logits(case: Case) -> Tensor:
    return activations(case, "logits", case.n.V, large=4)


def previous(case: Case) -> Tensor:
    return torch.randint(case.n.V, (case.n.T,), generator=case.generator("previous"))


def logit_inputs(case: Case) -> Inputs:
    return {"logits_V": logits(case), **case.options}


def penalty_inputs(case: Case) -> Inputs:
    return {**logit_inputs(case), "previous_T": previous(case)}


def hides_no_nan(op: Op, function: Function, case: Case) -> None:
    """A logit that is NaN is refused by an error of that kind, or some logit that comes out is NaN.

    Whoever chooses a token refuses NaN (`next_token`), and must not find them ruled out or replaced.
    """
    place = case.seed % case.n.V
    given = op.inputs(case)["logits_V"].index_fill(0, torch.tensor([place]), torch.nan)
    out_V = with_nan(op, function, case, "logits_V", given)
    assert out_V is None or bool(out_V.isnan().any()), f"logits_V[{place}] is NaN, and no logit that comes out is"


def _nan_taken_for_zero(function: Function) -> Function:
    return changed(function, lambda inputs: {"logits_V": inputs["logits_V"].nan_to_num(nan=0.0)})


# --- penalize_repetition, scale_temperature -------------------------------------------------------------------------


def penalty_by_loop(*, logits_V: Tensor, previous_T: Tensor, penalty: float) -> Tensor:
    out = logits_V.clone()
    for token in set(previous_T.tolist()):
        out[token] = logits_V[token] / penalty if logits_V[token] > 0 else logits_V[token] * penalty
    return out


def _penalty_for_every_occurrence(*, logits_V: Tensor, previous_T: Tensor, penalty: float) -> Tensor:
    for token in previous_T:
        logits_V = penalize_repetition(logits_V, token[None], penalty)
    return logits_V


def _negative_made_likelier(*, logits_V: Tensor, previous_T: Tensor, penalty: float) -> Tensor:
    out = logits_V.clone()
    out[previous_T] = logits_V[previous_T] / penalty
    return out


def _last_token_spared(inputs: Inputs) -> Inputs:
    return {"previous_T": inputs["previous_T"][:-1]}


def _penalty_subtracted(*, logits_V: Tensor, previous_T: Tensor, penalty: float) -> Tensor:
    out = logits_V.clone()
    out[previous_T] -= penalty - 1
    return out


def unseen_tokens_keep_their_bits(op: Op, function: Function, case: Case) -> None:
    """Only tokens that occurred change."""
    inputs = op.inputs(case)
    unseen_V = torch.ones_like(inputs["logits_V"], dtype=torch.bool).index_fill(0, inputs["previous_T"], False)
    assert torch.equal(function(**inputs)[unseen_V], inputs["logits_V"][unseen_V])


PENALISE_REPETITION = Op(
    name="penalize_repetition",
    larger=LARGER_VOCABULARY,
    paper="-",
    axes="V T",
    reference=penalize_repetition,
    outputs=("V",),
    cases=cases_of("penalize_repetition", penalty=[1.3, 1.0, 2.0, 0.7]),
    inputs=penalty_inputs,
    guarantee=Budget(rows="V"),
    properties=(repeats_itself, hides_no_nan, unseen_tokens_keep_their_bits),
    variants={"loop": penalty_by_loop},
    mutants={
        "nan_taken_for_zero": _nan_taken_for_zero(penalize_repetition),
        "once_for_every_occurrence": _penalty_for_every_occurrence,
        "negative_logits_made_likelier": _negative_made_likelier,
        "last_token_spared": changed(penalize_repetition, _last_token_spared),
        "subtracted": _penalty_subtracted,
    },
    flops=lambda n: n.V,
    bytes=lambda n: 4 * 2 * n.V + 8 * n.T,
    no_fast=HOST,
)

SCALE_TEMPERATURE = Op(
    name="scale_temperature",
    larger=LARGER_VOCABULARY,
    paper="-",
    axes="V",
    reference=scale_temperature,
    outputs=("V",),
    cases=cases_of("scale_temperature", temperature=[0.7, 1.0, 2.0, 0.1]),
    inputs=logit_inputs,
    guarantee=Budget(rows="V"),
    properties=(repeats_itself, hides_no_nan),
    variants={"reciprocal": lambda logits_V, temperature: logits_V * (1 / temperature)},
    mutants={
        "nan_taken_for_zero": _nan_taken_for_zero(scale_temperature),
        "multiplied": lambda logits_V, temperature: logits_V * temperature,
        "ignored": lambda logits_V, temperature: logits_V.clone(),
        "root": lambda logits_V, temperature: logits_V / temperature**0.5,
    },
    flops=lambda n: n.V,
    bytes=lambda n: 4 * 2 * n.V,
    no_fast=HOST,
)


# --- the three filters ----------------------------------------------------------------------------------------------


def sorted_by_hand(logits_V: Tensor) -> list[int]:
    """Token ids from the likeliest down; of equals the lower id first."""
    return sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))


def _keep(logits_V: Tensor, kept: Sequence[int]) -> Tensor:
    out = torch.full_like(logits_V, -torch.inf)
    for token in kept:
        out[token] = logits_V[token]
    return out


def _top_k_by_hand(*, logits_V: Tensor, k: int) -> Tensor:
    return _keep(logits_V, sorted_by_hand(logits_V)[:k])


def _top_k_later_ties(*, logits_V: Tensor, k: int) -> Tensor:
    return keep_top_k(logits_V.flip(0), k).flip(0)


def _top_k_all_ties(*, logits_V: Tensor, k: int) -> Tensor:
    least = logits_V.sort(descending=True).values[min(k, len(logits_V)) - 1]
    return logits_V.masked_fill(logits_V < least, -torch.inf)


def _top_k_zeros(*, logits_V: Tensor, k: int) -> Tensor:
    return keep_top_k(logits_V, k).nan_to_num(neginf=0.0)


def keeps_exactly_k(op: Op, function: Function, case: Case) -> None:
    """min(k, V) tokens stay, with their own bits, and none of the others is likelier."""
    inputs = op.inputs(case)
    out, logits_V = function(**inputs), inputs["logits_V"]
    kept_V = out.isfinite()
    assert int(kept_V.sum()) == min(inputs["k"], len(logits_V))
    assert torch.equal(out[kept_V], logits_V[kept_V])
    assert not (~kept_V).any() or bool(logits_V[kept_V].min() >= logits_V[~kept_V].max())


def _filter_regret(score: Callable[[Inputs], Tensor]) -> Callable[[Inputs, list[Tensor]], Tensor]:
    """For tokens kept or ruled out against the truth, how clear that case was; `score` >= 0 means keep."""

    def regret(exact: Inputs, got: list[Tensor]) -> Tensor:
        logits_V, out_V = exact["logits_V"], got[0].double()
        score_V = score(exact)
        kept_V = out_V != -torch.inf
        wrongly_V = kept_V != (score_V >= 0)
        regret_V = torch.where(wrongly_V, score_V.abs(), 0.0)
        return regret_V.masked_fill(kept_V & (out_V != logits_V), torch.inf)  # what stays keeps its value

    return regret


def _running_sum(exact: Inputs) -> Tensor:
    """A sum of V probabilities, which never exceeds 1, rounds V times: equal ones alike, and others at random."""
    equal_N: Tensor = exact["logits_V"].unique(return_counts=True)[1]
    return equal_N.double().square().sum().sqrt()


def _one(exact: Inputs) -> Tensor:
    return torch.ones(())


def _top_k_score(exact: Inputs) -> Tensor:
    """How far above the k-th likeliest logit; of those equal to it any may go or stay, as long as k stay."""
    logits_V: Tensor = exact["logits_V"]
    k = min(exact["k"], len(logits_V))
    return logits_V - logits_V.sort(descending=True).values[k - 1]


def _top_k_regret(exact: Inputs, got: list[Tensor]) -> Tensor:
    regret_V = _filter_regret(_top_k_score)(exact, got)
    kept = int((got[0] != -torch.inf).sum())
    return regret_V if kept == min(exact["k"], len(regret_V)) else torch.full_like(regret_V, torch.inf)


def _nothing_rounds(exact: Inputs) -> Tensor:
    return torch.zeros(())


KEEP_TOP_K = Op(
    name="keep_top_k",
    larger=LARGER_VOCABULARY,
    paper="-",
    axes="V",
    reference=keep_top_k,
    outputs=("V",),
    cases=cases_of("keep_top_k", k=[1, 2, 3, 10, 64, 65, 100, 128, 129, 1000]),
    inputs=logit_inputs,
    guarantee=Bitwise(),
    properties=(repeats_itself, hides_no_nan, keeps_exactly_k),
    variants={"by_hand": _top_k_by_hand},
    mutants={
        "nan_taken_for_zero": _nan_taken_for_zero(keep_top_k),
        "one_too_many": lambda logits_V, k: keep_top_k(logits_V, k + 1),
        "ties_to_the_higher_id": _top_k_later_ties,
        "all_of_a_tie_kept": _top_k_all_ties,
        "zero_for_minus_infinity": _top_k_zeros,
    },
    conventions={
        "ties=any": {"guarantee": Discrete(regret=_top_k_regret, scale=_nothing_rounds, exact_on_integers=False)}
    },
    flops=lambda n: 0,
    bytes=lambda n: 4 * 2 * n.V,
    no_fast=HOST,
)


def _top_p_score(exact: Inputs) -> Tensor:
    """p minus the probability of all likelier tokens; the likeliest always stays."""
    logits_V, p = exact["logits_V"], exact["p"]
    order_V = torch.tensor(sorted_by_hand(logits_V))
    probability_V = torch.softmax(logits_V[order_V], -1)
    likelier_V = probability_V.cumsum(-1) - probability_V
    tiny = torch.finfo(torch.float64).tiny  # a token exactly at p goes: below zero, but no more than that
    score_V = torch.where(likelier_V >= p, (p - likelier_V).clamp_max(-tiny), p - likelier_V)
    score_V[0] = torch.inf
    return torch.empty_like(score_V).index_copy(0, order_V, score_V)


def _top_p_by_hand(*, logits_V: Tensor, p: float) -> Tensor:
    """A running sum in float32, from the likeliest down."""
    probability_V = torch.softmax(logits_V.float(), -1)
    kept: list[int] = []
    total = torch.zeros(())
    for token in sorted_by_hand(logits_V):
        if kept and float(total) >= p:
            break
        kept.append(token)
        total = total + probability_V[token]
    return _keep(logits_V, kept)


def _top_p_shifted(*, logits_V: Tensor, p: float, by: int) -> Tensor:
    count = int(keep_top_p(logits_V, p).isfinite().sum())
    return _keep(logits_V, sorted_by_hand(logits_V)[: max(count + by, 0)])


def _top_p_by_logits(*, logits_V: Tensor, p: float) -> Tensor:
    """Cumulates in the order of the vocabulary."""
    probability_V = torch.softmax(logits_V, -1)
    return logits_V.masked_fill(probability_V.cumsum(-1) - probability_V >= p, -torch.inf)


KEEP_TOP_P = Op(
    name="keep_top_p",
    larger=LARGER_VOCABULARY,
    paper="-",
    axes="V",
    reference=keep_top_p,
    outputs=("V",),
    cases=cases_of("keep_top_p", p=[0.9, 0.5, 0.1, 1.0, 0.99]),
    inputs=logit_inputs,
    guarantee=Discrete(regret=_filter_regret(_top_p_score), scale=_running_sum, exact_on_integers=False),
    properties=(repeats_itself, hides_no_nan),
    variants={"running_sum": _top_p_by_hand},
    mutants={
        "nan_taken_for_zero": _nan_taken_for_zero(keep_top_p),
        "one_too_many": partial(_top_p_shifted, by=1),
        "one_too_few": partial(_top_p_shifted, by=-1),
        "not_sorted": _top_p_by_logits,
        "complement": lambda logits_V, p: keep_top_p(logits_V, max(1 - p, 1e-9)),
    },
    flops=lambda n: 5 * n.V,
    bytes=lambda n: 4 * 2 * n.V,
    no_fast=HOST,
)


def _min_p_score(exact: Inputs) -> Tensor:
    logits_V: Tensor = exact["logits_V"]
    ratio_V = torch.exp(logits_V - logits_V.max())
    score_V: Tensor = ratio_V - exact["p"]
    return score_V


def _min_p_by_probability(*, logits_V: Tensor, p: float) -> Tensor:
    probability_V = torch.softmax(logits_V, -1)
    return logits_V.masked_fill(probability_V < p * probability_V.max(), -torch.inf)


def _absolute_min_p(*, logits_V: Tensor, p: float) -> Tensor:
    return logits_V.masked_fill(torch.softmax(logits_V, -1) < p, -torch.inf)


KEEP_MIN_P = Op(
    name="keep_min_p",
    larger=LARGER_VOCABULARY,
    paper="-",
    axes="V",
    reference=keep_min_p,
    outputs=("V",),
    cases=cases_of("keep_min_p", p=[0.1, 0.5, 0.0, 1.0]),
    inputs=logit_inputs,
    guarantee=Discrete(regret=_filter_regret(_min_p_score), scale=_one, exact_on_integers=False),
    properties=(repeats_itself, hides_no_nan),
    variants={"by_probability": _min_p_by_probability},
    mutants={
        "nan_taken_for_zero": _nan_taken_for_zero(keep_min_p),
        "absolute": _absolute_min_p,
        "complement": lambda logits_V, p: keep_min_p(logits_V, 1 - p),
        "likeliest_ruled_out": lambda logits_V, p: logits_V.masked_fill(logits_V == logits_V.max(), -torch.inf),
    },
    flops=lambda n: 2 * n.V,
    bytes=lambda n: 4 * 2 * n.V,
    no_fast=HOST,
)
