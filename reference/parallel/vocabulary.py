"""The two ends of a model whose vocabulary is divided among the ranks of a tensor group.

    tokens    rank r looks up the tokens of its own piece of the table, all others count as zeros; then an all-reduce
    head      rank r scores the tokens of its own piece; then an all-gather along the vocabulary

One rank only has a nonzero row for a token, so the sum is exact. Pieces are equal but for the last: of 10 tokens on 4
ranks, ranks 0 to 2 hold 3 and rank 3 holds token 9. A tied head scores with the piece of the table that the rank has
anyway (Shoeybi et al. 2019, section 3).

Shapes: R ranks (a list), B batch, T tokens, M hidden, W table width, V vocabulary (of a rank, its piece).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...spec.config import ModelConfig
from ...spec.shard import vocabulary_piece
from ...spec.weights import EmbeddingWeights, LinearWeights
from ..components import DEFAULT, Components
from ..embedding import embed, head_logits, scale_and_cap
from .collectives import all_gather
from .ledger import Ledger
from .stage import Stage


def embed_over_ranks(
    token_RBT: Sequence[Tensor],
    start_R: Sequence[int],
    weights_R: Sequence[EmbeddingWeights],
    config: ModelConfig,
    dtype: torch.dtype,
    stage: Stage,
    components: Components = DEFAULT,
) -> list[Tensor]:
    """Embed tokens that stand at positions from `start` on; returns each rank's [B, T, M], equal within a group."""
    part_RBTW = [
        rows_of_piece(token_BT, weights.token_VW, _first_token(config, stage, rank)).to(_wide(dtype))
        for rank, (token_BT, weights) in enumerate(zip(token_RBT, weights_R, strict=True))
    ]
    x_RBTM = []
    for row_BTW, token_BT, start, weights in zip(stage.add_up(part_RBTW), token_RBT, start_R, weights_R, strict=True):
        place_BT = torch.arange(token_BT.numel(), device=token_BT.device).view(token_BT.shape)
        found = replace(weights, token_VW=row_BTW.flatten(0, 1))  # the rows asked for, in the order in which they are
        position_T = torch.arange(start, start + token_BT.shape[1], device=token_BT.device)
        x_RBTM.append(embed(place_BT, position_T, found, config, dtype, components=components))
    return x_RBTM


def rows_of_piece(token_BT: Tensor, piece_VW: Tensor, first: int) -> Tensor:
    """Look up tokens in a piece of the table that begins with token `first`; zeros for tokens that it lacks.

    >>> rows_of_piece(torch.tensor([4, 3, 5]), torch.tensor([[1.0], [2.0]]), first=4).flatten().tolist()
    [1.0, 0.0, 2.0]
    """
    local_BT = token_BT - first
    held_BT = (local_BT >= 0) & (local_BT < len(piece_VW))
    return piece_VW[local_BT.where(held_BT, 0)] * held_BT[..., None].to(piece_VW.dtype)


def logits_over_ranks(
    x_RTW: Sequence[Tensor],
    projection_R: Sequence[LinearWeights],
    config: ModelConfig,
    stage: Stage,
    components: Components = DEFAULT,
) -> list[Tensor]:
    """Score the whole vocabulary for hidden vectors [..., W]; returns each rank's [..., V], equal within a group."""
    part_RTV = [
        head_logits(x_TW, projection, linear=components.linear)
        for x_TW, projection in zip(x_RTW, projection_R, strict=True)
    ]

    def gather(part_TV: list[Tensor], ranks: list[int], ledger: Ledger) -> list[Tensor]:
        return all_gather(part_TV, ranks, ledger, dim=-1)

    logits_RTV = stage.within(stage.parallel.tensor_groups, gather, part_RTV)
    return [scale_and_cap(logits_TV, config.logit_scale, config.logit_softcap) for logits_TV in logits_RTV]


def _first_token(config: ModelConfig, stage: Stage, rank: int) -> int:
    return vocabulary_piece(config.vocabulary, stage.parallel.shard(rank)).start


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
