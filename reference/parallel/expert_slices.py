"""Expert slicing: ranks of a slice group hold different slices of the same experts, cut like any MLP.

Each slice must see every row: peers first get each other's rows by an all-gather, then what the slices make of them is
added up by an all-reduce, of which each peer keeps its own rows. The numbers of rows are gathered first.

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
