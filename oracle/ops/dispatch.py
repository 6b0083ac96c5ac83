"""The record of what brings tokens to their experts: dispatch, by tables.

Shapes: T tokens, K = top_k, E experts, C capacity, S = E * C slots, M hidden.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import dispatch as reference
from ...reference.dispatch import DROPPED, capacity, slots, tokens_of_slots
from ...reference.routing import Routing
from ...spec.decoder import Path
from ...spec.moe import CapacityConfig, DropOrder
from .. import fast_moe as fast
from ..case import DTYPES, UNMASKED, Case, Data, Inputs, Picker, activations
from ..guarantees import Discrete
from ..op import Function, Op
from ..properties import assert_same_bits, call, repeats_itself
from ..sizes import HIDDEN, TOKENS, resized
from ..variants import changed

EXPERTS = (16, 17, 64, 65, 128)
FACTORS = (None, 0.25, 0.5, 1.0, 1.25, 2.0)
"""Each is exact in binary, so that the capacity is the same however it is multiplied."""


class Dispatched(NamedTuple):
    """Tokens in the slots of their experts, and the tables by which they got there."""

    slot_TK: Tensor
    """expert * C + place within the expert, int64; -1 for a choice that is dropped."""
    token_S: Tensor
    """The token of each slot, int64; -1 where it is empty."""
    chosen_E: Tensor
    """How many choices each expert got, those that are dropped included, int64."""
    x_ECM: Tensor
    """The tokens' rows, zeros where a slot is empty."""


def dispatched(
    *,
    x_TM: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    experts: int,
    factor: float | None,
    minimum: int,
    order: DropOrder,
) -> Dispatched:
    """Give the choices of tokens their slots, and copy the tokens into them.

    An expert has max(ceil(factor * T * K / E), minimum) slots, at most T; T without a factor. All first choices are
    served in the order of the tokens, then all second choices; or, by `order`, those of the largest weights are kept.
    """
    config = None if factor is None else CapacityConfig(factor=factor, minimum=minimum, drop_order=order)
    places = capacity(len(x_TM), experts, expert_TK.shape[1], config)
    slot_TK = slots(Routing(expert_TK, weight_TK), experts, places, order)
    chosen_E = expert_TK.flatten().bincount(minlength=experts)
    token_S = tokens_of_slots(slot_TK, experts, places)
    return Dispatched(slot_TK, token_S, chosen_E, reference.dispatch(x_TM, slot_TK, experts, places))


def drawn_routing(pick: Picker, op: str) -> Case:
    experts = pick.integer(1, 6)
    return Case(
        op=op,
        sizes={"T": pick.integer(1, 8), "K": pick.integer(1, 3), "E": experts, "M": pick.integer(1, 6)},
        options={
            "factor": pick.choice(FACTORS),
            "minimum": pick.choice([1, 1, 2, 4]),
            "order": pick.choice([order.value for order in DropOrder]),
            "favored": pick.choice(["none", "one", "few"]),
        },
        data=pick.choice(UNMASKED),
        dtype=pick.choice(DTYPES),
        seed=pick.integer(0, 2**31),
    )


def dispatch_cases(pick: Picker) -> Case:
    return drawn_routing(pick, "dispatch")


def routing(case: Case) -> Routing:
    """Choices of different experts: of all, of one first, or of few; weights with ties, the later ones not smaller."""
    n, generator = case.n, case.generator("experts")
    score_TE = torch.rand(n.T, n.E, generator=generator)
    match case.options["favored"]:
        case "one":
            score_TE[:, -1] += 1
        case "few":
            score_TE[:, : -(-n.E // 2)] += 1
        case _:
            pass
    expert_TK = score_TE.argsort(-1, descending=True)[:, : n.K]
    weight_TK = torch.rand(expert_TK.shape, generator=generator)
    if case.data in (Data.TIES, Data.INTEGER, Data.CONSTANT):
        weight_TK = (4 * weight_TK).ceil() * (1.0 if case.data is Data.INTEGER else 0.25)
    return Routing(expert_TK, weight_TK)


def dispatch_inputs(case: Case) -> Inputs:
    options: Any = case.options
    expert_TK, weight_TK = routing(case)
    return {
        "x_TM": activations(case, "x", case.n.T, case.n.M),
        "expert_TK": expert_TK,
        "weight_TK": weight_TK,
        "experts": case.n.E,
        "factor": options["factor"],
        "minimum": options["minimum"],
        "order": DropOrder(options["order"]),
    }


def _tables_differ(exact: Inputs, got: list[Tensor]) -> Tensor:
    """Infinite unless tables and rows are right; products read bfloat16's subnormals as zero, and so one may."""
    *tables, wanted_ECM = dispatched(**exact)
    x_ECM = got[3]
    least = torch.finfo(x_ECM.dtype).smallest_normal if x_ECM.dtype is torch.bfloat16 else 0.0
    same = (x_ECM == wanted_ECM) | ((x_ECM == 0) & (wanted_ECM.abs() < least))
    right = bool(same.all()) and all(map(torch.equal, tables, got[:3]))
    return torch.tensor(0.0 if right else torch.inf)


def _kept_otherwise(exact: Inputs, got: list[Tensor]) -> Tensor:
    """Zero where the tables are right but for which of equally weighed choices were dropped, else infinite."""
    wanted = dispatched(**exact)
    slot_TK, token_S, chosen_E, x_ECM = got
    expert_TK, weight_TK = exact["expert_TK"], exact["weight_TK"]
    experts, places = exact["experts"], x_ECM.shape[1]
    served_TK = slot_TK != DROPPED
    inside = bool(((slot_TK >= DROPPED) & (slot_TK < experts * places)).all())
    if not inside or not torch.equal(chosen_E, wanted.chosen_E):
        return torch.tensor(torch.inf)
    own = torch.equal(torch.where(served_TK, slot_TK // max(places, 1), expert_TK), expert_TK)
    once = len(set(slot_TK[served_TK].tolist())) == int(served_TK.sum())
    copied = torch.equal(reference.dispatch(exact["x_TM"], slot_TK, experts, places), x_ECM.double())
    tables = torch.equal(tokens_of_slots(slot_TK, experts, places), token_S)

    def weights(slots_TK: Tensor) -> list[list[float]]:
        kept_TK = slots_TK != DROPPED
        return [sorted(weight_TK[kept_TK & (expert_TK == expert)].tolist()) for expert in range(experts)]

    right = own and once and copied and tables and weights(slot_TK) == weights(wanted.slot_TK)
    return torch.tensor(0.0 if right else torch.inf)


def _nothing_rounds(exact: Inputs) -> Tensor:
    return torch.zeros(())


_DECIDED = Discrete(regret=_tables_differ, scale=_nothing_rounds, exact_on_integers=False)


def _by_loop(
    *,
    x_TM: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    experts: int,
    factor: float | None,
    minimum: int,
    order: DropOrder,
) -> Dispatched:
    """Attempt after attempt, on Python's lists; the rows are put into their slots by an einsum over a one-hot mask."""
    tokens, top_k = expert_TK.shape
    wanted = tokens if factor is None else max(-int(-factor * tokens * top_k // experts), minimum)
    places = min(tokens, wanted)
    attempts = [(token, choice) for choice in range(top_k) for token in range(tokens)]
    kept = set()
    for expert in range(experts):
        own = [each for each in attempts if int(expert_TK[each]) == expert]
        if order is DropOrder.HIGHEST_SCORE:
            own = sorted(own, key=lambda each: -float(weight_TK[each]))
        kept |= set(own[:places])
    slot_TK, token_S = torch.full_like(expert_TK, DROPPED), torch.full((experts * places,), DROPPED)
    used = [0] * experts
    for token, choice in attempts:
        if (token, choice) in kept:
            expert = int(expert_TK[token, choice])
            slot = expert * places + used[expert]
            slot_TK[token, choice], token_S[slot] = slot, token
            used[expert] += 1
    chosen_E = torch.tensor([int((expert_TK == expert).sum()) for expert in range(experts)])
    mask_TKEC = reference.slot_mask(slot_TK, experts, places)
    return Dispatched(slot_TK, token_S, chosen_E, reference.dispatch_one_hot(x_TM, mask_TKEC))


def _with_slots(choose: Callable[..., Tensor]) -> Function:
    """The tables that follow from other slots, which `choose` gives of a routing, experts, places and order."""

    def wrong(*, x_TM: Tensor, expert_TK: Tensor, weight_TK: Tensor, experts: int, **how: Any) -> Dispatched:
        right = dispatched(x_TM=x_TM, expert_TK=expert_TK, weight_TK=weight_TK, experts=experts, **how)
        places = right.x_ECM.shape[1]
        slot_TK = choose(Routing(expert_TK, weight_TK), experts, places, how["order"])
        x_ECM = reference.dispatch(x_TM, slot_TK, experts, places)
        return Dispatched(slot_TK, tokens_of_slots(slot_TK, experts, places), right.chosen_E, x_ECM)

    return wrong


def _flipped(of: Routing, axis: int) -> Routing:
    return Routing(of.expert_TK.flip(axis), of.weight_TK.flip(axis))


def _token_by_token(of: Routing, experts: int, places: int, order: DropOrder) -> Tensor:
    """A token's second choice before the next token's first."""
    one_by_one = Routing(of.expert_TK.reshape(-1, 1), of.weight_TK.reshape(-1, 1))
    return slots(one_by_one, experts, places, order).view_as(of.expert_TK)


def _lowest_score(of: Routing, experts: int, places: int, order: DropOrder) -> Tensor:
    return slots(Routing(of.expert_TK, -of.weight_TK), experts, places, order)


def _dropped_into_the_last_place(of: Routing, experts: int, places: int, order: DropOrder) -> Tensor:
    """What finds no slot overwrites the last one of its expert."""
    slot_TK = slots(of, experts, places, order)
    return torch.where(slot_TK == DROPPED, of.expert_TK * places + places - 1, slot_TK)


def _dropped_with_its_token(of: Routing, experts: int, places: int, order: DropOrder) -> Tensor:
    """A token of which one choice is dropped loses the others too."""
    slot_TK = slots(of, experts, places, order)
    return slot_TK.masked_fill((slot_TK == DROPPED).any(-1, keepdim=True), DROPPED)


def _one_place_lost(of: Routing, experts: int, places: int, order: DropOrder) -> Tensor:
    """The capacity is one less, in slots as large."""
    slot_TK = slots(of, experts, places, order)
    return torch.where((slot_TK % places == places - 1) & (slot_TK >= 0), DROPPED, slot_TK)


def _by_weight_in_the_slots(of: Routing, experts: int, places: int, order: DropOrder) -> Tensor:
    """The right ones are kept, and stand in the slots by weight."""
    if order is DropOrder.FIRST_COME:
        return slots(of, experts, places, order)
    rank_A = of.weight_TK.t().flatten().sort(descending=True, stable=True).indices
    token_A, choice_A = rank_A % len(of.expert_TK), rank_A // len(of.expert_TK)
    used, slot_TK = [0] * experts, torch.full_like(of.expert_TK, DROPPED)
    for at in zip(token_A.tolist(), choice_A.tolist(), strict=True):
        expert = int(of.expert_TK[at])
        if used[expert] < places:
            slot_TK[at] = expert * places + used[expert]
            used[expert] += 1
    return slot_TK


def _empty_slots_copy_the_first_token(**inputs: Any) -> Dispatched:
    out = dispatched(**inputs)
    x_ECM = inputs["x_TM"][out.token_S.clamp_min(0)].view(out.x_ECM.shape)
    return out._replace(x_ECM=x_ECM)


def _dropped_not_counted(**inputs: Any) -> Dispatched:
    out = dispatched(**inputs)
    served_A = inputs["expert_TK"][out.slot_TK != DROPPED]
    return out._replace(chosen_E=served_A.bincount(minlength=inputs["experts"]))


def _capacity_rounded_down(**inputs: Any) -> Dispatched:
    if inputs["factor"] is not None:
        tokens, top_k = inputs["expert_TK"].shape
        places = int(inputs["factor"] * tokens * top_k / inputs["experts"])
        inputs = {**inputs, "factor": 1e-9, "minimum": max(places, inputs["minimum"])}
    return dispatched(**inputs)


def _capacity_without_top_k(**inputs: Any) -> Dispatched:
    """factor * T / E, as where only first choices are counted."""
    factor = inputs["factor"]
    top_k = inputs["expert_TK"].shape[1]
    return dispatched(**{**inputs, "factor": None if factor is None else factor / top_k})


def _rows_in(dtype: torch.dtype) -> Function:
    def wrong(**inputs: Any) -> Dispatched:
        out = dispatched(**inputs)
        return out._replace(x_ECM=out.x_ECM.to(dtype).to(out.x_ECM.dtype))

    return wrong


def _factor_of(value: float | None) -> Callable[[Inputs], Inputs]:
    return lambda inputs: {"factor": value}


def enough_places_drop_nothing(op: Op, function: Function, case: Case) -> None:
    """With as many slots an expert as there are tokens every choice has one, as without a capacity."""
    inputs = op.inputs(case)
    enough = {"minimum": case.n.T, "factor": 1e-3}
    given, free = (call(op, function, case, **each) for each in (enough, {"factor": None}))
    assert bool((given[0] != DROPPED).all()), "a choice is dropped, and there are as many slots as tokens"
    assert len(inputs["x_TM"]) == given[3].shape[1]
    assert_same_bits(given, free, "as many slots as tokens and no capacity")


def nan_stays_in_its_slots(op: Op, function: Function, case: Case) -> None:
    """A token that is NaN makes no slot NaN but its own; what is empty stays zero."""
    inputs = op.inputs(case)
    token = case.seed % case.n.T
    x_TM = inputs["x_TM"].index_fill(0, torch.tensor([token]), torch.nan)
    _, token_S, _, x_ECM = call(op, function, case, x_TM=x_TM)
    is_nan_S = x_ECM.flatten(0, 1).isnan().any(-1)
    assert torch.equal(is_nan_S, token_S == token), f"token {token} is NaN, and so are slots of other tokens"


DISPATCH = Op(
    name="dispatch",
    larger=resized({"T": TOKENS, "E": EXPERTS, "M": HIDDEN}),
    paper="V-C",
    axes="T K E M",
    reference=dispatched,
    outputs=("T K", "S", "E", "E C M"),
    cases=dispatch_cases,
    inputs=dispatch_inputs,
    guarantee=_DECIDED,
    properties=(repeats_itself, enough_places_drop_nothing),
    variants={"by_loop": _by_loop},
    mutants={
        "drop_order_swapped": changed(
            dispatched,
            lambda inputs: {"order": next(order for order in DropOrder if order is not inputs["order"])},
        ),
        "last_come": _with_slots(
            lambda of, experts, places, order: slots(_flipped(of, 0), experts, places, order).flip(0)
        ),
        "second_choices_first": _with_slots(
            lambda of, experts, places, order: slots(_flipped(of, 1), experts, places, order).flip(1)
        ),
        "token_by_token": _with_slots(_token_by_token),
        "lowest_score": _with_slots(_lowest_score),
        "slots_by_weight": _with_slots(_by_weight_in_the_slots),
        "dropped_into_the_last_place": _with_slots(_dropped_into_the_last_place),
        "dropped_with_its_token": _with_slots(_dropped_with_its_token),
        "one_place_lost": _with_slots(_one_place_lost),
        "empty_slots_copy_the_first_token": _empty_slots_copy_the_first_token,
        "dropped_not_counted": _dropped_not_counted,
        "capacity_rounded_down": _capacity_rounded_down,
        "capacity_without_top_k": _capacity_without_top_k,
        "minimum_forgotten": changed(dispatched, lambda inputs: {"minimum": 1}),
        "capacity_forgotten": changed(dispatched, _factor_of(None)),
        "rows_through_float16": _rows_in(torch.float16),
    },
    conventions={
        "unseen=nan": {"properties": (repeats_itself, enough_places_drop_nothing, nan_stays_in_its_slots)},
        "ties=any": {
            "guarantee": Discrete(regret=_kept_otherwise, scale=_nothing_rounds, exact_on_integers=False),
        },
    },
    flops=lambda n: 0,
    bytes=lambda n: 4 * 2 * n.T * n.K * n.M + 20 * n.T * n.K + 8 * n.E,
    fast={Path.COMPILED: fast.DISPATCH},
)
