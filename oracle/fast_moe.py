"""The compiled path's routers and experts as fast twins: called like the reference.

Shapes: as in the reference's files.
"""

from torch import Tensor

from ..compiled import routing
from .case import Inputs
from .op import Fast, Function


def _route(function: Function, inputs: Inputs) -> tuple[Tensor, Tensor]:
    routed = function(inputs["logit_TE"], inputs["config"], inputs["choice_bias_E"])
    return routed.expert_TK, routed.weight_TK


ROUTE = (Fast(routing.route, _route),)
