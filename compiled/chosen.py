"""Products with the words of chosen experts, read where they lie.

Why it is faster: the words of the chosen experts are indexed by a tensor within the loop of the product, so that no
expert is copied or expanded, and nothing is read on the host. Rows of one expert that stand in a tile share its words.

Two tiles of two rows each, of experts 3 and 0 (P = 2, R = 2):

    expert_P     3 0
    out[0]       x[0] times expert 3's matrix, both rows
    out[1]       x[1] times expert 0's

Shapes: A choices, P tiles of R rows each, E experts, N outputs, I inputs, B blocks of U outputs of one expert, J words
in C places, G groups of W words.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..spec.config import Storage
from .compute import accumulation_dtype
from .linear import materialized
from .packing import GROUP_WORDS, PLACES, RAISED, Matrix, lowering, place_values, raised_codes


def chosen_product(x_AI: Tensor, expert_A: Tensor, weights: Matrix, storage: Storage) -> Tensor:
    """Return each row times the matrix of its own expert, [A, N] in x's dtype. A is small and fixed in a graph."""
    wide_A1I = with_filling(x_AI.to(accumulation_dtype(x_AI.dtype)), weights.word, storage)[:, None]
    out_AN = tile_products(wide_A1I, expert_A, *weights[:4], storage)[:, 0, : weights.outputs]
    if weights.bias_N is not None:
        out_AN = out_AN + weights.bias_N[expert_A]
    return out_AN.to(x_AI.dtype)


def with_filling(x: Tensor, word: Tensor, storage: Storage) -> Tensor:
    """Return rows that are as long as the experts' words have places, filled up with zeros."""
    return x if storage is Storage.FLOAT32 else functional.pad(x, (0, PLACES[storage] * word.shape[2] - x.shape[-1]))


def tile_products(
    x_PRI: Tensor,
    expert_P: Tensor,
    word: Tensor,
    scale_N: Tensor | None,
    scale_BGU: Tensor | None,
    min_BGU: Tensor | None,
    storage: Storage,
) -> Tensor:
    """Return each tile times the matrix of its expert, [P, R, N] with what fills up the last block, without biases.

    The tensors of the experts are as `experts.stack` makes them, and x is float32 or float64, `with_filling`.
    """
    rows, x_PRI = x_PRI.shape[1], materialized(x_PRI)
    if storage is Storage.FLOAT32:
        weight_PNI = word[expert_P]
        return torch.stack([(weight_PNI * x_PRI[:, row, None]).sum(-1) for row in range(rows)], 1)
    if storage is Storage.INT4:
        return _grouped(x_PRI, expert_P, word, scale_BGU, min_BGU)
    out_PRN = _planar(x_PRI, expert_P, word, storage)
    return out_PRN if scale_N is None else out_PRN * scale_N[expert_P][:, None]


def _planar(x_PRI: Tensor, expert_P: Tensor, word: Tensor, storage: Storage) -> Tensor:
    """Return the sums over all words; those of int8 are not yet scaled."""
    places, (tiles, rows, _) = PLACES[storage], x_PRI.shape
    x_PRCJ = x_PRI.view(tiles, rows, places, 1, word.shape[2], 1)
    word_PBJU = word[expert_P]
    values = [place_values(word_PBJU, storage, place, x_PRI.dtype) for place in range(places)]
    sums = []
    for row in range(rows):
        total = values[0] * x_PRCJ[:, row, 0]
        for place in range(1, places):
            total = total + values[place] * x_PRCJ[:, row, place]
        sums.append(total.sum(2).flatten(1))
    return torch.stack(sums, 1)


def _grouped(x_PRI: Tensor, expert_P: Tensor, word: Tensor, scale_BGU: Tensor | None, min_BGU: Tensor | None) -> Tensor:
    """Return the sums over all words, as `linear` does for int4."""
    assert scale_BGU is not None
    assert min_BGU is not None
    places, (tiles, rows, _) = PLACES[Storage.INT4], x_PRI.shape
    x_PRGCW = x_PRI.view(tiles, rows, word.shape[2] // GROUP_WORDS, places, GROUP_WORDS)
    sum_PRJ = materialized((x_PRGCW.sum(3) * RAISED).flatten(2))[:, :, None, :, None]
    lowered_CPRJ = x_PRGCW.permute(3, 0, 1, 2, 4) * lowering(x_PRI.device)[:, None, None, None, None]
    lowered_CPRJ = materialized(lowered_CPRJ.flatten(3).contiguous())[:, :, :, None, :, None]
    word_PBJU = word[expert_P]
    scale_PBJU, min_PBJU = (
        each[expert_P][:, :, :, None].expand(-1, -1, -1, GROUP_WORDS, -1).flatten(2, 3) for each in (scale_BGU, min_BGU)
    )
    values = [raised_codes(word_PBJU, place, x_PRI.dtype) for place in range(places)]
    sums = []
    for row in range(rows):
        total = values[0] * lowered_CPRJ[0, :, row]
        for place in range(1, places):
            total = total + values[place] * lowered_CPRJ[place, :, row]
        sums.append((total * scale_PBJU + sum_PRJ[:, row] * min_PBJU).sum(2).flatten(1) / RAISED)
    return torch.stack(sums, 1)
