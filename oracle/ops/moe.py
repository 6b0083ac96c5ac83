"""The record of a mixture of experts: moe.

Shapes: B batch, T tokens, M hidden, F intermediate, E experts, K = top_k, C capacity.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from ...reference.moe import moe
from ...spec.decoder import Path
from .. import fast_moe as fast
from ..choices import Steered
from ..op import Op
from ..properties import repeats_itself
from ..sizes import TOKENS, resized
from ..variants import one_row_3_percent_off, then
from .moe_cases import fused_conventions, moe_cases, moe_inputs
from .moe_faults import FAULTS
from .moe_laws import enough_places_change_nothing, identical_experts_equal_one, nan_stays, tokens_may_be_permuted
from .moe_scale import moe_scale, router_scale
from .moe_variants import all_experts, gathered_in_slots, reporting
from .route import recipes

_WIDTHS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256)


MOE = Op(
    name="moe",
    larger=resized({"E": (16, 17, 32, 64, 65, 128), "T": TOKENS, "M": _WIDTHS, "F": _WIDTHS, "K": (1, 2, 8)}),
    paper="V, V-C",
    axes="B T M F E K",
    reference=moe,
    outputs=("B T M",),
    cases=moe_cases,
    inputs=moe_inputs,
    guarantee=Steered(
        routed=lambda forced: partial(moe, route=forced), scale=moe_scale, logit_scale=router_scale, rows="B T"
    ),
    properties=(
        repeats_itself,
        tokens_may_be_permuted,
        enough_places_change_nothing,
        identical_experts_equal_one,
        nan_stays,
    ),
    variants={"all_experts": all_experts, "in_slots": gathered_in_slots, "reporting": reporting},
    mutants={**FAULTS, "row_3_percent_off": then(moe, one_row_3_percent_off)},
    conventions={
        "ties=any": lambda op: {"guarantee": _any_of_ties(op)},
        **recipes(),
        **fused_conventions(),
    },
    flops=lambda n: 2 * n.B * n.T * n.M * (n.E + 3 * n.K * n.F),
    bytes=lambda n: 4 * (2 * n.B * n.T * n.M + n.E * n.M + 3 * n.E * n.M * n.F),
    fast={Path.COMPILED: fast.MOE},
)


def _any_of_ties(op: Op) -> Any:
    guarantee: Any = op.guarantee
    return replace(guarantee, lower_index=False)
