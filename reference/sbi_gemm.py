"""The paper's small-batch product (SBI-GeMM, section III-C, Fig. 1a and 1b) as a program.

    out[b, n] = sum_k x[b, k] * weight[k, n]

With few rows b the time is that of reading the weight once. So the work is divided for reading:

- *Tiles.* The outputs are divided into tiles; a thread block owns a tile and sums over all of K, so that no block waits
  for another. Every block reads all of x, which is small.
- *Sections.* Where N is so small that tiles alone would leave multiprocessors idle, K is divided too. A first kernel
  writes a partial sum for each section, a second one adds them: two launches, and only where they pay.
- *Warps and lanes.* Within a block each of 4 warps takes every fourth line of the weight, and each of its 32 lanes one
  output of a strip of 32. So the partial sums of one output lie in 4 warps. Adding them as a tree through shared memory
  would synchronize the block at every level. Instead they are transposed in shared memory once, so that those of one
  output lie side by side, and a single warp adds them in registers, by a cooperative group's reduction; the results go
  through shared memory once more, to be stored in one coalesced write.
- *Lines.* A memory transaction fetches 128 bytes, but 32 lanes that read one 16-bit weight each ask for 64, with int8
  for 32. So M consecutive rows of the weight are interleaved, column by column, when it is loaded: M = 2 for 16 bits,
  4 for int8. A lane then reads M weights of its own output at once, and a warp a whole line (`interleave`).

What the GPU does at once is here a loop; who adds what, and in which order, is as there. Public code of the paper holds
no such kernel: the layout's index is our reading of Fig. 1b, the numbers of `tiling` are ours.

Shapes: B rows of x, K inputs, N outputs, M interleaved rows, L = ceil(K / M) lines, S sections, W warps.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import pad

from ..spec.errors import RequestError

WARPS = 4
LANES = 32
LANE_BYTES = 4
"""What one lane reads at once: 32 lanes read a line of 128 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    tile: int
    """Outputs of a block: a multiple of LANES."""
    sections: int
    """Into how many parts the lines are divided: one, or more where N is small."""


def tiling(outputs: int, lines: int, blocks: int) -> Tiling:
    """Divide the work among at least `blocks` blocks, where it can be; raises `RequestError` for less than one.

    The tile is the largest multiple of 32 of which that many fit in N. Where even tiles of 32 are too few, K is
    divided into sections until they are enough, or until each has just a line for every warp. For 108 multiprocessors
    and 16-bit weights: 4096 to 16384 gives 128 tiles of 128; 1600 to 1600 gives 50 tiles of 32, times 3 sections.

    >>> tiling(16384, lines=2048, blocks=108)
    Tiling(tile=128, sections=1)
    >>> tiling(1600, lines=800, blocks=108)
    Tiling(tile=32, sections=3)
    """
    if blocks < 1:
        raise RequestError(f"blocks is {blocks}; it must be at least 1")
    tile = max(outputs // blocks // LANES, 1) * LANES
    tiles = -(-outputs // tile)
    return Tiling(tile=tile, sections=min(-(-blocks // tiles), max(lines // WARPS, 1)))


def interleave(weight_KN: Tensor, rows: int) -> Tensor:
    """[K, N] as lines [L, N * M]: weight (k, n) at line k // M, column n * M + k % M; lacking rows are zero.

    >>> interleave(torch.tensor([[1, 2, 3], [10, 20, 30], [100, 200, 300]]), rows=2).tolist()
    [[1, 10, 2, 20, 3, 30], [100, 0, 200, 0, 300, 0]]
    """
    whole_KN = pad(weight_KN, (0, 0, 0, -weight_KN.shape[0] % rows))
    return rearrange(whole_KN, "(l m) n -> l (n m)", m=rows)


def deinterleave(line_LX: Tensor, rows: int, inputs: int) -> Tensor:
    """The [K, N] that `interleave` was given, of K inputs."""
    return rearrange(line_LX, "l (n m) -> (l m) n", m=rows)[:inputs]


def sbi_gemm(x_BK: Tensor, weight_KN: Tensor, *, blocks: int) -> Tensor:
    """x @ weight as [B, N], in x's dtype, by at least `blocks` blocks; products and sums are float32 or wider.

    The weight may be of integers (int8 codes), which count as they are.
    """
    wide = torch.promote_types(x_BK.dtype, torch.float32)
    rows = max(1, LANE_BYTES // weight_KN.element_size())
    line_LX = interleave(weight_KN, rows)  # once, when the weight is loaded
    divided = tiling(weight_KN.shape[1], len(line_LX), blocks)

    weight_LNM = rearrange(line_LX, "l (n m) -> l n m", m=rows).to(wide)  # a lane reads its M weights at once
    x_BLM = rearrange(pad(x_BK, (0, -x_BK.shape[1] % rows)), "b (l m) -> b l m", m=rows).to(wide)
    sections = zip(x_BLM.tensor_split(divided.sections, 1), weight_LNM.tensor_split(divided.sections), strict=True)
    partial_SBN = torch.stack(
        [
            torch.cat([_block(part_BLM, tile_LNM) for tile_LNM in torch.split(part_LNM, divided.tile, 1)], 1)
            for part_BLM, part_LNM in sections
        ]
    )
    return _second_pass(partial_SBN).to(x_BK.dtype)


def _block(x_BLM: Tensor, weight_LNM: Tensor) -> Tensor:
    """What one thread block adds up: its tile of the outputs over its section of the lines, as [B, N of the tile]."""
    partial_WBN = torch.stack(
        [
            einsum(x_BLM[:, warp::WARPS], weight_LNM[warp::WARPS], "b l m, l n m -> b n")  # each lane has its own n
            for warp in range(WARPS)
        ]
    )
    transposed_BNW = rearrange(partial_WBN, "w b n -> b n w")  # in shared memory, once
    return transposed_BNW.sum(-1)  # by one warp, in registers


def _second_pass(partial_SBN: Tensor) -> Tensor:
    """Add the sections; a kernel of its own, which is not launched for one section."""
    return partial_SBN.sum(0)
