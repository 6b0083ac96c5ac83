"""Expert slicing: ranks of a slice group hold different slices of the same experts (paper, section V-A, Fig. 4).

Slices are cut like any MLP, up by rows and down by columns, so what an expert makes of a row is a sum over its slices:

    expert(x) = sum_s down_s f(up_s x)

In the figure, of 16 GPUs with 8 experts in 2 slices, GPUs e and e + 8 hold the slices of expert e. Each slice must see
every row that reached either: by an all-gather peers get each other's rows, by an all-reduce the sum, of which each
keeps its own rows. How many rows go to which expert is gathered too.

Example: a slice group of two that holds experts 0 and 1. One peer brings for these 2 and 1 rows that came from one
rank, the other 0 and 3. Gathered, the 6 rows belong to experts 0 0 1 | 1 1 1, and the second peer keeps the last three.

Shapes: R ranks (a list), P peers that rows came from, S slices, E experts of a rank, N rows, M hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec.moe import MoeConfig
from ...spec.weights import ExpertWeights
from ..components import Components
from .collectives import all_gather, all_reduce
from .exchange import Pieces
from .stage import Stage


def serve_rows(
    arrived_RP: Sequence[Pieces],
    count_RPE: Sequence[Pieces],
    weights_R: Sequence[ExpertWeights],
    config: MoeConfig,
    stage: Stage,
    components: Components,
) -> list[Tensor]:
    """Return what a rank's experts make of the rows that arrived: of peer p's, `count[p][e]` for each expert e."""
    groups, place_in_group = stage.parallel.slice_groups, {}
    for group in groups:
        place_in_group.update({rank: place for place, rank in enumerate(group)})
    all_RNM = stage.within(groups, all_gather, [torch.cat(piece_P) for piece_P in arrived_RP])
    counts_RSPE = stage.within(groups, all_gather, [torch.stack(count_PE)[None] for count_PE in count_RPE])
    out_RNM = []
    for all_NM, counts_SPE, weights in zip(all_RNM, counts_RSPE, weights_R, strict=True):
        expert_N = torch.arange(counts_SPE.shape[-1]).expand(counts_SPE.shape).flatten()
        expert_N = expert_N.repeat_interleave(counts_SPE.flatten())
        out_NM = torch.zeros_like(all_NM)
        for expert in range(counts_SPE.shape[-1]):
            mine_N = (expert_N == expert).nonzero()[:, 0]
            out_NM[mine_N] = components.mlp(all_NM[mine_N], weights[expert], config.expert, linear=components.linear)
        out_RNM.append(out_NM)
    summed_RNM = stage.within(groups, all_reduce, out_RNM)
    return [
        torch.split(summed_NM, counts_SPE.sum((1, 2)).tolist())[place_in_group[rank]]
        for rank, (summed_NM, counts_SPE) in enumerate(zip(summed_RNM, counts_RSPE, strict=True))
    ]
