"""The bounds of a layer follow the reference's own order of parts."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.oracle.budget import Sizes
from twinfer.oracle.case import Case, Data, RandomPicker
from twinfer.oracle.ops.layer_scale import Sized, scale_of_layer
from twinfer.oracle.ops.mlp import mlp_known
from twinfer.oracle.ops.moe_cases import moe_config, moe_inputs
from twinfer.oracle.ops.moe_variants import all_experts
from twinfer.oracle.resolution import off_by
from twinfer.oracle.scale import exactly, norm_known, sum_known
from twinfer.oracle.table import OPS
from twinfer.oracle.trial import Status
from twinfer.reference import layer as layer_file
from twinfer.reference.components import DEFAULT
from twinfer.reference.routing import Routing, choice_weights, route
from twinfer.spec.config import NormPlacement, Residual

LAYER = OPS["layer"]


def drawn(**options: Any) -> Case:
    """The first drawn case with these options, its numbers normal; without experts, if not asked for."""
    options = {"experts": None, **options}
    cases = (LAYER.cases(RandomPicker(seed)) for seed in range(2000))
    return next(replace(case, data=Data.NORMAL) for case in cases if options.items() <= case.options.items())


def sizes(case: Case) -> Sizes:
    return scale_of_layer(LAYER.trial(LAYER.reference, case).sized_inputs, [])[0]


@pytest.mark.parametrize("placement", [NormPlacement.PRE_NORM, NormPlacement.POST_NORM, NormPlacement.OUTPUT_NORM])
def test_a_factor_dropped_from_the_reference_changes_the_bound(
    placement: NormPlacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second spelling of the layer remembers the factor."""
    case = drawn(placement=placement.value, residual=Residual.SEQUENTIAL.value, residual_scale=0.25)
    before = sizes(case)
    joined = layer_file.joined

    def unscaled(x: Tensor, out: Tensor, weights: Any, config: Any, components: Any) -> Tensor:
        return joined(x, out, weights, replace(config, residual_scale=1.0), components)

    monkeypatch.setattr(layer_file, "joined", unscaled)
    after = sizes(case)
    assert not torch.equal(before.wide, after.wide)
    assert not torch.equal(torch.as_tensor(before.narrow), torch.as_tensor(after.narrow))


def test_a_result_rounds_where_it_is_read_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without attention a pre-norm layer is x + mlp(norm(x)), whose parts are put together here by hand."""

    def nothing_attended(x_BTM: Any, weights: Any, config: Any, cache: Any, components: Any) -> Any:
        return Sized.of_input(torch.zeros(x_BTM.shape, dtype=torch.float64)), cache

    monkeypatch.setattr(layer_file, "self_attention", nothing_attended)
    case = drawn(placement="pre_norm", residual="parallel", residual_scale=1.0)
    exact = LAYER.trial(LAYER.reference, case).sized_inputs
    weights, config = exact["weights"], exact["config"]
    x = exactly(exact["x_BTM"])
    read = norm_known(x, weights.mlp_norm or weights.attention_norm, config.norm).stored
    fed = mlp_known(read, weights.mlp, config.mlp).stored
    wanted = sum_known(sum_known(x, exactly(torch.zeros_like(x.value))).stored, fed)
    got = sizes(case)
    torch.testing.assert_close(got.wide, wanted.wide, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.narrow, wanted.narrow / 2, rtol=1e-14, atol=0)


def test_what_nobody_bounded_is_refused() -> None:
    """A new operation between the layer's parts needs its bound before anything is judged by it."""
    with pytest.raises(TypeError, match=r"nobody has said what .*exp.* rounds"):
        torch.exp(Sized.of_input(torch.ones(2, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_experts_has_a_bound_that_lets_right_ones_pass_and_sees_5_percent(dtype: torch.dtype) -> None:
    """Of each recipe: experts that sum in another order are right, and ones whose result is 5 % off are not."""

    def with_experts(function: Any) -> Any:
        def moe(x_BTM: Tensor, weights: Any, config: Any, **_: Any) -> Any:
            return function(x_BTM=x_BTM, weights=weights, config=config)

        return lambda **inputs: LAYER.reference(**inputs, components=replace(DEFAULT, moe=moe))

    seen = 0
    for seed in range(12):
        mixture = replace(OPS["moe"].cases(RandomPicker(seed)), dtype=dtype, data=Data.NORMAL)
        mixture = replace(mixture, options={**mixture.options, "factor": None})
        case = replace(drawn(placement="pre_norm"), dtype=dtype, seed=seed)
        case = replace(case, sizes={**case.sizes, "M": mixture.n.M})
        dense = LAYER.inputs(case)
        config = replace(dense["config"], mlp=moe_config(mixture))
        weights = replace(dense["weights"], mlp=moe_inputs(mixture)["weights"])
        op = replace(LAYER, inputs=lambda _, new={**dense, "config": config, "weights": weights}: new)  # type: ignore[misc]
        verdict = op.guarantee.judge(op.trial(with_experts(all_experts), case))
        assert not verdict.failed, f"{verdict.complaint} {verdict.details} {mixture!r}"
        wrong = with_experts(off_by(all_experts, 0.05, "all"))
        seen += op.guarantee.judge(op.trial(wrong, case)).failed
    assert seen >= 11


@pytest.mark.parametrize("tied", [True, False])
def test_another_choice_of_experts_is_rejected_where_the_router_nearly_ties_and_a_fault_elsewhere(tied: bool) -> None:
    """A layer that takes expert 1 for 0 and 3 for 2, with router weights that are equal in pairs, and that are not."""
    case = replace(drawn(experts=4, recipe="mixtral", top_k=1), dtype=torch.float32)

    def neighbor(logit_TE: Tensor, config: Any, bias_E: Any = None, /) -> Routing:
        expert_TK = route(logit_TE, config, bias_E).expert_TK ^ 1
        return Routing(expert_TK, choice_weights(logit_TE, expert_TK, config))

    def inputs(case: Case) -> Any:
        given = LAYER.inputs(case)
        block = given["weights"].mlp
        weight_NI = block.router.weight_NI[::2].repeat_interleave(2, 0) if tied else block.router.weight_NI
        block = replace(block, router=replace(block.router, weight_NI=weight_NI))
        return {**given, "weights": replace(given["weights"], mlp=block)}

    op = replace(LAYER, inputs=inputs)
    verdict = op.guarantee.judge(op.trial(partial(layer_file.layer, components=replace(DEFAULT, route=neighbor)), case))
    assert verdict.status is (Status.REJECTED if tied else Status.FAILED)
