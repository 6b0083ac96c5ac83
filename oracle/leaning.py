"""Errors that point one way: by how much must one number of the model be wrong to explain what is seen?

In bfloat16 a layer whose attention scale is 3 % off moves a row by less than its roundings do, and no bound on a row
sees it. But roundings point anywhere, while a wrong number moves all rows along one direction d, the derivative of the
outputs by the logarithm of that number. So the errors e of all rows together are projected on it:

    lean = sum_r w_r <e_r, d_r>        w_r = 1 / (mean square of the nudged eager errors of row r)
    |lean| <= 2 |lean of the plain eager run| + K * sqrt(v)
    v = the sum over sequences of the mean square lean of the nudged eager runs

A nudge falls anew in every sequence, so the squares add; v is at least sum w <d, d>, the variance of errors that are
independent in every element. A nudge is about three roundings, so K of them are three times as many deviations of a
right path. But a rounding of what recurs, such as a token's embedding, is the same each time: it leans too, and the
plain eager run shares it. What explains the errors best is the number times 1 + offset:

    offset = lean / sum_r w_r <d_r, d_r>

An offset within a rounding of the number itself, eps(compute) / 2, is none. One backward pass through the float64
reference projects an error on the directions of all numbers at once, and passes on random signs z estimate the divisor:
the mean of (sum sqrt(w) <z, d>)^2 is sum w <d, d>.

Only 16-bit arithmetic is judged so. In float32 and float64 the bound of a row resolves such a number already, and the
truth is no more exact than what it judges: there, roundings of a few rows lean by chance.

Shapes: T tokens of a sequence, R of its rows that were judged, V elements of a row, N eager runs, P numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.components import DEFAULT, Components, Route
from ..reference.decoder import empty_caches, forward
from ..reference.embedding import head_logits, scale_and_cap
from ..reference.path import ReferencePath
from ..spec.weights import LayerWeights

K = 2.5
PROBES = 2
"""Random directions a sequence, from which the divisor of the offset is estimated."""
NUMBERS = ("attention scale", "attention output", "MLP output", "norm epsilon")
"""The numbers of a layer that are looked at; an output is multiplied by one that ought to be 1."""


def is_judged(compute: torch.dtype) -> bool:
    """Whether errors of this arithmetic are looked at for how they lean."""
    return torch.finfo(compute).bits == 16


@dataclass(frozen=True, slots=True, eq=False)
class Leaning:
    """How the errors of some sequences lean, for each number of each layer. Those of more sequences add up."""

    lean_P: Tensor
    eager_P: Tensor
    """The plain eager run's."""
    variance_P: Tensor
    square_P: Tensor
    """sum w <d, d>."""

    def __add__(self, other: "Leaning") -> "Leaning":
        return Leaning(
            self.lean_P + other.lean_P,
            self.eager_P + other.eager_P,
            self.variance_P + other.variance_P,
            self.square_P + other.square_P,
        )

    @property
    def offset_P(self) -> Tensor:
        return self.lean_P / self.square_P.clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def ratio_P(self) -> Tensor:
        """Lean / allowed."""
        allowed_P = 2 * self.eager_P.abs() + K * torch.maximum(self.variance_P, self.square_P).sqrt()
        return self.lean_P.abs() / allowed_P.clamp_min(torch.finfo(torch.float64).tiny)

    def fault(self, compute: torch.dtype) -> str | None:
        """Return what is wrong with the number that explains most, if any is off."""
        off_P = (self.ratio_P > 1) & (self.offset_P.abs() > torch.finfo(compute).eps / 2)
        if not off_P.any():
            return None
        worst = int(self.ratio_P.where(off_P, 0.0).argmax())
        layer, number = divmod(worst, len(NUMBERS))
        number_of_layer = f"layer {layer}'s {NUMBERS[number]}"
        return (
            f"errors lean one way: as if {number_of_layer} were off by {float(self.offset_P[worst]):+.2%}, "
            f"that is {float(self.ratio_P[worst]):.3g} times what roundings explain"
        )


def leaning(
    truth: ReferencePath,
    token_T: Tensor,
    row_R: Sequence[int],
    error_RV: Tensor,
    eager_NRV: Tensor,
    floor_R: Tensor,
    *,
    type_T: Tensor | None = None,
    encoded: bool = False,
    route: Route = DEFAULT.route,
) -> Leaning:
    """Project a sequence's errors, and those of its eager runs, all but the first of them nudged, on all directions.

    `row_R` are the positions of the rows; no row counts as more exact than `floor_R`. Rows are logits, or hidden
    vectors where they were `encoded`. `route` gives the choices of experts that the truth was forced to.
    """
    square_R = eager_NRV[1:].square().mean((0, -1)) + floor_R.square() + torch.finfo(torch.float64).tiny
    generator = torch.Generator().manual_seed(len(token_T))
    sign_ZRV = 2.0 * torch.randint(0, 2, (PROBES, *error_RV.shape), generator=generator) - 1
    weighed = torch.cat([error_RV[None] / square_R[:, None], eager_NRV / square_R[:, None]])
    weighed = torch.cat([weighed, sign_ZRV / square_R.sqrt()[:, None]]).to(truth.device)
    with torch.enable_grad():
        factor_LP = torch.ones(
            len(truth.weights.layers), len(NUMBERS), dtype=torch.float64, device=truth.device, requires_grad=True
        )
        components = replace(_with_factors(truth.weights.layers, factor_LP), route=route)
        caches = empty_caches(1, truth.config, torch.float64, truth.device)
        type_BT = None if type_T is None else type_T[None].to(truth.device)
        given = (token_T[None].to(truth.device), caches, truth.weights, truth.config, torch.float64, components)
        out_BTW, _ = forward(*given, type_BT=type_BT)
        out_RV = out_BTW[0][list(row_R)]
        if not encoded:
            out_RV = head_logits(out_RV, truth.weights.projection)
            out_RV = scale_and_cap(out_RV, truth.config.logit_scale, truth.config.logit_softcap)
        leans = [
            torch.autograd.grad(out_RV, factor_LP, each_RV, retain_graph=True)[0].flatten().cpu() for each_RV in weighed
        ]
    runs = len(eager_NRV)
    return Leaning(
        lean_P=leans[0],
        eager_P=leans[1],
        variance_P=torch.stack(leans[2 : 1 + runs]).square().mean(0),
        square_P=torch.stack(leans[1 + runs :]).square().mean(0),
    )


def _with_factors(layers: Sequence[LayerWeights], factor_LP: Tensor) -> Components:
    """The reference's components, with every number times its factor."""
    places = {id(weights): index for index, weights in enumerate(layers)}

    def layer(x_BTM: Tensor, weights: LayerWeights, config: Any, cache: Any, components: Components, /) -> Any:
        scale, attended, fed, epsilon = factor_LP[places[id(weights)]]

        def attention(*inputs: Tensor, **options: Any) -> Tensor:
            out: Tensor = attended * DEFAULT.attention(*inputs, **{**options, "scale": scale * options["scale"]})
            return out

        def mlp(*inputs: Any, **options: Any) -> Tensor:
            out: Tensor = fed * DEFAULT.mlp(*inputs, **options)
            return out

        def moe(*inputs: Any, **options: Any) -> Tensor:
            out: Tensor = fed * DEFAULT.moe(*inputs, **{**options, "mlp": DEFAULT.mlp})
            return out

        config = replace(config, norm=replace(config.norm, epsilon=epsilon * config.norm.epsilon))
        numbered = replace(components, attention=attention, mlp=mlp, moe=moe)
        return DEFAULT.layer(x_BTM, weights, config, cache, numbered)

    return replace(DEFAULT, layer=layer)
