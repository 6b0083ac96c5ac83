"""Products with stored matrices: for a few rows straight from the packed words, for many through float32.

Why it is faster: with one row, `(W * x).sum(-1)` fused over the packed words reads each word once and never writes a
weight; torch's own matrix-vector product is at best as fast in float32 and cannot read packed words. With many rows
the arithmetic dominates, so the words are expanded once, one matrix at a time, for torch's matrix product; the graph
takes the same memory for one after the other.

Shapes: R or T rows, N outputs, I inputs, J words a row, V vocabulary, M hidden.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from ..spec.config import Storage
from .packing import LANES, lane_values, unpack


class Matrix(NamedTuple):
    """A stored matrix as a graph sees it: `Packed` with the words bit-cast to float32."""

    word_NJ: Tensor
    scale_N: Tensor | None
    bias_N: Tensor | None


def linear_few(x_RI: Tensor, matrix: Matrix, storage: Storage) -> Tensor:
    """x @ weight.T + bias for a few rows, float32 [R, N], the weights read once and never expanded."""
    x_RI = settled(x_RI)
    if storage is Storage.FLOAT32 and x_RI.shape[0] > 1:
        return functional.linear(x_RI, matrix.word_NJ, matrix.bias_N)
    lanes, words = LANES[storage], matrix.word_NJ.shape[1]
    x_RI = functional.pad(x_RI, (0, lanes * words - x_RI.shape[1])) if lanes * words > x_RI.shape[1] else x_RI
    product_NRJ = None
    for lane in range(lanes):
        weight_NJ = lane_values(matrix.word_NJ, storage, lane)
        term_NRJ = weight_NJ[:, None, :] * x_RI[None, :, lane * words : (lane + 1) * words]
        product_NRJ = term_NRJ if product_NRJ is None else product_NRJ + term_NRJ
    assert product_NRJ is not None
    out_NR = product_NRJ.sum(-1)
    if matrix.scale_N is not None:
        out_NR = out_NR * matrix.scale_N[:, None]
    if matrix.bias_N is not None:
        out_NR = out_NR + matrix.bias_N[:, None]
    return out_NR.t().contiguous()  # rows that are strided here would be summed one by one in the next norm and product


def linear_many(x_TI: Tensor, matrix: Matrix, storage: Storage) -> Tensor:
    """x @ weight.T + bias for many rows, float32 [T, N]."""
    weight_NI = unpack(matrix.word_NJ, matrix.scale_N, storage, x_TI.shape[1])
    return functional.linear(x_TI, weight_NI, matrix.bias_N)


def lookup(token_T: Tensor, table: Matrix, storage: Storage, hidden: int) -> Tensor:
    """Rows of the stored token table, float32 [T, M]."""
    scale_T = None if table.scale_N is None else table.scale_N[token_T]
    return unpack(table.word_NJ[token_T], scale_T, storage, hidden)


def settled(x: Tensor) -> Tensor:
    """The same tensor, which Inductor is made to finish before its consumer runs.

    Otherwise it would fuse what made x (a norm, an activation) into the product and repeat it for every output row.
    """
    return x.as_strided(x.shape, x.stride())
