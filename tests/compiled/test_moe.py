"""Mixtures of experts on the compiled path: choices exactly as the reference makes them, then numbers by budget."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinfer.compiled import dispatch as dispatch_module
from twinfer.compiled import expert_kernels as kernels_module
from twinfer.compiled import experts as experts_module
from twinfer.compiled import path as path_module
from twinfer.compiled.chosen import chosen_product
from twinfer.compiled.dispatch import combine, dispatch, one_hot_form, slots_of, table_form
from twinfer.compiled.embedding import Product
from twinfer.compiled.experts import grouped_product, sort_by_expert, stack
from twinfer.compiled.linear import linear_decode, linear_prefill
from twinfer.compiled.moe import Mlp, Moe, moe
from twinfer.compiled.packing import Matrix, pack, quantize
from twinfer.compiled.path import CompiledPath
from twinfer.compiled.routing import route
from twinfer.oracle.baseline import Baseline
from twinfer.oracle.case import Picker, RandomPicker
from twinfer.oracle.models import RandomSource
from twinfer.oracle.paths import assert_paths_agree
from twinfer.oracle.schedule import Extend, draw_schedule
from twinfer.oracle.strategies import drawn
from twinfer.reference import dispatch as plain
from twinfer.reference.routing import Routing
from twinfer.reference.routing import route as plain_route
from twinfer.spec.config import Activation, MlpConfig, Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.moe import DropOrder, MoeConfig, RouterConfig, Score
from twinfer.spec.weights import StackedLinearWeights

from .graph_machine import same_bits
from .moe_models import draw_moe_config, draw_router

CONTEXT = 40
HIDDEN = 6
EXACT = [Storage.FLOAT32, Storage.BFLOAT16, Storage.INT8]
"""Storages that hold integers up to 127 as they are."""
seeds = st.integers(0, 2**20)
storages = st.sampled_from(Storage)


def drawn_logits(pick: Picker, router: RouterConfig, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Logits and a choice bias of four values each, so that much is tied."""
    logit_TE = torch.tensor(
        [[pick.choice([0.0, -2.0, 0.5, 3.0]) for _ in range(router.experts)] for _ in range(tokens)]
    )
    bias_E = torch.tensor([pick.choice([0.0, 1.0, -1.0]) for _ in range(router.experts)])
    return logit_TE, bias_E if router.choice_bias else None


routings = drawn(lambda pick: (router := draw_router(pick), *drawn_logits(pick, router, pick.integer(1, 7))))


@given(case=routings)
def test_ties_and_all_else_are_chosen_as_the_reference_chooses(case: tuple[Any, ...]) -> None:
    """The same experts in the same order, and weights within 4 units in the last place."""
    router, logit_TE, bias_E = case
    found, wanted = route(logit_TE, router, bias_E), plain_route(logit_TE, router, bias_E)
    assert found.expert_TK.tolist() == wanted.expert_TK.tolist()
    ulp = torch.finfo(torch.float32).eps * wanted.weight_TK.abs()
    assert ((found.weight_TK - wanted.weight_TK).abs() <= 4 * ulp).all()


def test_a_group_counts_by_its_best_two() -> None:
    """Of logits 4 -4 | 3 3 the second group has the larger sum, and the first the larger best."""
    router = RouterConfig(experts=4, top_k=1, score=Score.SIGMOID, groups=2, kept_groups=1)
    logit_TE = torch.tensor([[4.0, -4.0, 3.0, 3.0]])
    assert route(logit_TE, router).expert_TK.tolist() == plain_route(logit_TE, router).expert_TK.tolist() == [[2]]


@given(case=routings)
def test_a_nan_chooses_experts_that_exist_and_shows(case: tuple[Any, ...]) -> None:
    """No index leaves the weights, whichever logit is NaN, and what its token is given is NaN; no other token's is."""
    router, logit_TE, bias_E = case
    logit_TE[0, len(logit_TE) % router.experts] = torch.nan
    expert_TK, weight_TK = route(logit_TE, router, bias_E)
    assert int(expert_TK.min()) >= 0
    assert int(expert_TK.max()) < router.experts
    assert weight_TK[0].isnan().all()
    assert not weight_TK[1:].isnan().any()


def stacked(pick: Picker) -> tuple[StackedLinearWeights, Tensor, int]:
    """Integer weights, so that every product is exact in any order, of experts with or without a bias."""
    experts, outputs, inputs = pick.integer(1, 5), pick.choice([16, 5, 8, 33]), pick.choice([64, 3, 70])
    generator = torch.Generator().manual_seed(pick.integer(0, 2**20))
    weight_ENI = torch.randint(-7, 8, (experts, outputs, inputs), generator=generator).float()
    weight_ENI[..., 0], weight_ENI[..., -1] = 127, -127  # an int8 scale of 1
    bias_EN = torch.randint(-9, 9, (experts, outputs), generator=generator).float() if pick.integer(0, 1) else None
    x_TI = torch.randint(-4, 5, (pick.integer(1, 9), inputs), generator=generator).float()
    return StackedLinearWeights(weight_ENI=weight_ENI, bias_EN=bias_EN), x_TI, pick.integer(0, 2**20)


@given(case=drawn(stacked), storage=st.sampled_from(EXACT), piece=st.sampled_from([1, 2**19]))
def test_each_row_is_multiplied_by_its_own_expert(case: tuple[Any, ...], storage: Storage, piece: int) -> None:
    """Exactly, in both forms, whole or block by block, experts without a row and with all rows among them."""
    weights, x_TI, seed = case
    experts = len(weights.weight_ENI)
    expert_T = torch.randint(experts, (len(x_TI),), generator=torch.Generator().manual_seed(seed))
    wanted = torch.einsum("tni,ti->tn", weights.weight_ENI[expert_T], x_TI)
    if weights.bias_EN is not None:
        wanted = wanted + weights.bias_EN[expert_T]
    matrix = stack([weights], storage)
    assert torch.equal(chosen_product(x_TI, expert_T, matrix, storage), wanted)
    order = sort_by_expert(expert_T[:, None], experts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_module, "_PIECE", piece)
        grouped = grouped_product(x_TI[order.choice_A], order.rows_E, matrix, storage)
    assert torch.equal(grouped[order.place_A], wanted)


@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    biased=st.booleans(),
    storage=st.sampled_from(EXACT),
    seed=seeds,
)
def test_forms_of_a_gpu_are_the_loop_over_experts(rows: list[int], biased: bool, storage: Storage, seed: int) -> None:
    """By torch's grouped product and by masks, on this processor: exactly, in bfloat16, which holds these integers."""
    generator = torch.Generator().manual_seed(seed)
    weight_ENI = torch.randint(-3, 4, (len(rows), 16, 8), generator=generator).float()
    weight_ENI[..., 0] = 127  # an int8 scale of 1
    bias_EN = torch.randint(-9, 10, (len(rows), 16), generator=generator).float() if biased else None
    matrix = stack([StackedLinearWeights(weight_ENI=weight_ENI, bias_EN=bias_EN)], storage)
    x_AI = torch.randint(-1, 2, (sum(rows), 8), generator=generator).to(torch.bfloat16)
    x_AI[:, 0] = 0
    rows_E = torch.tensor(rows)
    wanted_AN = experts_module._grouped_product(x_AI, rows_E, *matrix, storage.value, False)
    for form in (experts_module._by_offsets, experts_module._by_masks):
        if len(x_AI):  # torch's wants a row
            assert torch.equal(form(x_AI, rows_E, matrix, storage), wanted_AN)


def test_torchs_grouped_product_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is right here; one that adds anything to its result, or is not there, is not used."""
    right, device = experts_module._grouped_mm, torch.device("cpu")
    assert right is not None
    for grouped_mm, used in ((right, True), (lambda *given, **named: right(*given, **named) + 1, False), (None, False)):
        experts_module._groups_rightly.cache_clear()
        monkeypatch.setattr(experts_module, "_grouped_mm", grouped_mm)
        assert experts_module._groups_rightly(device) is used
    experts_module._groups_rightly.cache_clear()


@given(
    seed=seeds,
    tokens=st.integers(1, 9),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    places=st.integers(1, 6),
    order=st.sampled_from(DropOrder),
    few=st.sampled_from([0, 256]),
)
def test_slots_and_rows_are_those_of_the_reference(
    seed: int, tokens: int, experts: int, top_k: int, places: int, order: DropOrder, few: int
) -> None:
    """Slots and their tokens exactly, by comparing or sorting; then sums of integers, and so exactly the same."""
    generator = torch.Generator().manual_seed(seed)
    top_k = min(top_k, experts)
    expert_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    routing = Routing(expert_TK, torch.randint(1, 5, (tokens, top_k), generator=generator).float())
    x_TM = torch.randint(-9, 9, (tokens, 4), generator=generator).float()
    slot_TK = plain.slots(routing, experts, places, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch_module, "_FEW_ATTEMPTS", few)
        mine = slots_of(routing, experts, places, order)
    assert mine.tolist() == slot_TK.tolist()
    given_ECM = plain.dispatch(x_TM, slot_TK, experts, places)
    assert torch.equal(dispatch(x_TM, mine, experts, places), given_ECM)
    out_ECM = given_ECM * torch.arange(1, experts + 1)[:, None, None]
    wanted = plain.combine(out_ECM, slot_TK, routing.weight_TK)
    assert torch.equal(combine(out_ECM, mine, routing.weight_TK), wanted)
    for form in (table_form, one_hot_form):
        found = form(x_TM, routing, experts, places, lambda x: x * torch.arange(1, experts + 1)[:, None, None], order)
        assert torch.equal(found, wanted)


schedules = drawn(
    lambda pick: (config := draw_moe_config(pick, context=CONTEXT), draw_schedule(pick, config), pick.integer(0, 2**20))
)


@given(case=schedules, storage=storages, piece=st.sampled_from([3, 2, 512]))
@settings(max_examples=12)
def test_mixtures_answer_as_the_reference_does(case: tuple[Any, ...], storage: Storage, piece: int) -> None:
    """Through any schedule, prompts in pieces: every choice is the truth's or admissible, and logits are in budget."""
    config, schedule, seed = case
    source = RandomSource(config, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_module, "_PREFILL_TOKENS", piece)
        path = CompiledPath(source, storage=storage, mode="eager", routes=True)
        found = assert_paths_agree(Baseline.of(source, storage=storage), path, schedule)
    tokens = sum(len(new) for step in schedule if isinstance(step, Extend) for new in step.new_tokens)
    assert found.choices == tokens * sum(isinstance(each.mlp, MoeConfig) for each in config.layers)


def exact_mixture(pick: Picker, storage: Storage) -> tuple[MoeConfig, Moe]:
    """A mixture of integers without any rounding before the weights, in every storage but int4."""
    router = draw_router(pick)
    expert = MlpConfig(width=pick.choice([8, 5, 16]), activation=Activation.RELU, gated=False, bias=False)
    generator = torch.Generator().manual_seed(pick.integer(0, 2**20))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    def stacked_part(outputs: int, inputs: int) -> Matrix:
        weight_ENI = integers(router.experts, outputs, inputs)
        weight_ENI[..., 0] = 127  # an int8 scale of 1
        return stack([StackedLinearWeights(weight_ENI=weight_ENI)], storage)

    bias_E = integers(router.experts) if router.choice_bias else None
    experts = Mlp(stacked_part(expert.width, HIDDEN), stacked_part(HIDDEN, expert.width))
    projection = pack(quantize(integers(router.experts, HIDDEN), Storage.FLOAT32))
    return MoeConfig(router=router, expert=expert), Moe(projection, bias_E, experts, None, None, None, None)


@given(storage=st.sampled_from(EXACT), tokens=st.integers(2, 7), seed=seeds)
def test_a_token_is_served_as_if_it_were_alone(storage: Storage, tokens: int, seed: int) -> None:
    """The same choices and the same bits, whatever stands beside it, however many, in both forms."""
    config, weights = exact_mixture(RandomPicker(seed), storage)
    generator = torch.Generator().manual_seed(seed)
    x_TM = torch.randint(-2, 3, (tokens, HIDDEN), generator=generator).float()

    def served(x_TM: Tensor, product: Product) -> tuple[list[list[int]], Tensor]:
        chosen_PK = torch.zeros(tokens, config.router.top_k, dtype=torch.int64)
        out_TM = moe(x_TM, weights._replace(chosen_PK=chosen_PK), config, storage, product)
        return chosen_PK[: len(x_TM)].tolist(), out_TM

    alone = [served(x_M[None], linear_decode) for x_M in x_TM]
    order_T = torch.randperm(tokens, generator=generator)
    for product in (linear_decode, linear_prefill):
        chosen, out_TM = served(x_TM[order_T], product)
        for place, token in enumerate(order_T.tolist()):
            assert chosen[place] == alone[token][0][0]
            assert same_bits(out_TM[place], alone[token][1][0])


@given(storage=storages, seed=seeds, rows=st.integers(2, 4))
def test_what_is_beside_a_row_of_a_step_changes_no_bit_of_it(storage: Storage, seed: int, rows: int) -> None:
    """Of weights and activations that round at every step."""
    generator = torch.Generator().manual_seed(seed)
    weights = StackedLinearWeights(weight_ENI=torch.randn(5, 9, 70, generator=generator))
    matrix, x_TI = stack([weights], storage), torch.randn(rows, 70, generator=generator)
    expert_T = torch.randint(5, (rows,), generator=generator)
    another_TI, another_T = torch.randn(rows, 70, generator=generator), torch.randint(5, (rows,), generator=generator)
    another_TI[0], another_T[0] = x_TI[0], expert_T[0]
    one, other = (chosen_product(*given, matrix, storage) for given in ((x_TI, expert_T), (another_TI, another_T)))
    assert same_bits(one[0], other[0])


def test_more_sequences_than_places_are_refused() -> None:
    config = draw_moe_config(RandomPicker(1))
    path = CompiledPath(RandomSource(config), mode="eager", routes=True)
    with pytest.raises(RequestError, match="513 sequences; with routes a path extends at most 512"):
        path.extend(path.open(513, 1), [torch.zeros(1, dtype=torch.int64)] * 513)
