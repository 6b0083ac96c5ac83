"""Experts on many ranks: whole experts on different ranks, slices of one on several (paper, section V-A, Fig. 4).

    route        each rank, for the tokens of its own tensor group
    dispatch     all-to-all within the expert group: rows go to the rank that holds their expert
    gather       all-gather within the slice group: peers with other slices of the same experts get each other's rows
    compute      each rank its slice of its experts
    reduce       all-reduce within the slice group; each keeps its own rows
    return       all-to-all back
    combine      each rank, in the order of the experts, as on one rank: out[t] = sum_k weight[t, k] * returned[t, k]

Where every token goes is known to its sender only, so the number of rows for each expert travels ahead of them. Weights
are applied where the token came from, after the return. MLPs beside the experts are sliced like any other.

Shapes: R ranks (a list), T tokens, K = top_k, E experts (of a rank, its own), M hidden, N rows.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ...spec.moe import MoeConfig
from ...spec.parallel import Exchange
from ...spec.weights import MlpWeights, MoeWeights
from ..components import DEFAULT, Components
from ..moe import router_logits
from ..routing import Routing
from .exchange import Pieces, experts_of_peers, gather_blocks, swap
from .expert_slices import serve_rows
from .stage import Stage


def moe(
    x_RBTM: Sequence[Tensor],
    weights_R: Sequence[MoeWeights],
    config: MoeConfig,
    stage: Stage,
    components: Components = DEFAULT,
) -> list[Tensor]:
    """Serve each token by its experts; x is equal on the ranks of a tensor group, and so is what is returned."""
    x_RTM = [rearrange(x_BTM, "b t m -> (b t) m") for x_BTM in x_RBTM]
    routing_R = [
        components.route(router_logits(x_TM, weights), config.router, weights.choice_bias_E)
        for x_TM, weights in zip(x_RTM, weights_R, strict=True)
    ]
    returned_R = _serve(x_RTM, routing_R, weights_R, config, stage, components)
    out_RTM = [_combine(*each) for each in zip(x_RTM, routing_R, returned_R, strict=True)]
    if config.shared is not None:
        shared_RTM = _beside("shared", x_RTM, weights_R, config, stage, components)
        for rank, (x_TM, weights) in enumerate(zip(x_RTM, weights_R, strict=True)):
            if weights.shared_gate is not None:
                logit_T1 = components.linear(_wide(x_TM), weights.shared_gate)
                shared_RTM[rank] = torch.sigmoid(logit_T1).to(x_TM.dtype) * shared_RTM[rank]
        out_RTM = [out_TM + shared_TM for out_TM, shared_TM in zip(out_RTM, shared_RTM, strict=True)]
    if config.residual is not None:
        beside_RTM = _beside("residual", x_RTM, weights_R, config, stage, components)
        for rank, (x_TM, weights) in enumerate(zip(x_RTM, weights_R, strict=True)):
            assert weights.coefficient is not None, "a residual mixture has weights of its mix"
            mix_T2 = torch.softmax(components.linear(_wide(x_TM), weights.coefficient), -1).to(x_TM.dtype)
            out_RTM[rank] = mix_T2[:, :1] * out_RTM[rank] + mix_T2[:, 1:] * beside_RTM[rank]
    return [out_TM.view(x_BTM.shape) for out_TM, x_BTM in zip(out_RTM, x_RBTM, strict=True)]


def _serve(
    x_RTM: Sequence[Tensor],
    routing_R: Sequence[Routing],
    weights_R: Sequence[MoeWeights],
    config: MoeConfig,
    stage: Stage,
    components: Components,
) -> list[Pieces]:
    """What the experts make of the rows that chose them: on each rank, for its tokens, [N, M] for each expert."""
    parallel, experts = stage.parallel, config.router.experts
    block_RE = [
        [x_TM[(routing.expert_TK == expert).nonzero()[:, 0]] for expert in range(experts)]
        for x_TM, routing in zip(x_RTM, routing_R, strict=True)
    ]
    length_RE = [[len(block) for block in block_E] for block_E in block_RE]
    held_R = experts_of_peers(parallel, experts)
    sent_R, told_R = [], []
    for block_E, length_E, held_P in zip(block_RE, length_RE, held_R, strict=True):
        sent_R.append([torch.cat([block_E[expert] for expert in held]) for held in held_P])
        told_R.append([torch.tensor([length_E[expert] for expert in held]) for held in held_P])
    count_R, arrived_R = swap(told_R, stage), swap(sent_R, stage)
    served_RNM = serve_rows(arrived_R, count_R, [weights.experts for weights in weights_R], config, stage, components)
    pairs = zip(served_RNM, arrived_R, strict=True)
    returned_R = swap(
        [list(torch.split(served, [len(piece) for piece in arrived])) for served, arrived in pairs], stage
    )
    named_R: list[dict[int, Tensor]] = []
    for returned, held_P, length_E in zip(returned_R, held_R, length_RE, strict=True):
        numbers = [expert for held in held_P for expert in held]
        parts = torch.split(torch.cat(returned), [length_E[expert] for expert in numbers])
        named_R.append(dict(zip(numbers, parts, strict=True)))
    if parallel.exchange is Exchange.COORDINATED:
        return gather_blocks(named_R, stage, length_RE)
    return [[named[expert] for expert in range(experts)] for named in named_R]


def _combine(x_TM: Tensor, routing: Routing, returned_E: Pieces) -> Tensor:
    """The weighted sum of what came back, in the weights' dtype, then rounded to x's."""
    out_TM = torch.zeros_like(x_TM, dtype=routing.weight_TK.dtype)
    for expert, row_NM in enumerate(returned_E):
        token_N, choice_N = (routing.expert_TK == expert).nonzero(as_tuple=True)
        out_TM[token_N] += routing.weight_TK[token_N, choice_N, None] * row_NM.to(out_TM.dtype)
    return out_TM.to(x_TM.dtype)


def _beside(
    part: str,
    x_RTM: Sequence[Tensor],
    weights_R: Sequence[MoeWeights],
    config: MoeConfig,
    stage: Stage,
    components: Components,
) -> list[Tensor]:
    """What the MLP of that name makes of every token, cut by the tensor degree."""
    mlps: list[MlpWeights] = [getattr(weights, part) for weights in weights_R]
    return stage.add_up(
        [
            components.mlp(x_TM, mlp, getattr(config, part), linear=components.linear)
            for x_TM, mlp in zip(x_RTM, mlps, strict=True)
        ]
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
