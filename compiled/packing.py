"""Weight matrices as packed words, and back.

Why it is faster: a decode step reads every weight once and does two operations with it, so it is as fast as memory;
fewer bytes a weight is more tokens a second. What it relies on: Inductor's CPU code loads float32 vectors directly but
integer vectors through a stack copy, so words are handed to a graph as float32 and bit-cast there (`as_graph_input`);
outside they are int32, because as float32 some words are NaN and not equal to themselves.

Packing is planar: with C codes to a word and J = ceil(I / C), lane c of word j holds column c * J + j, so that each
lane multiplies one contiguous slice of the activation. Columns past I hold zeros.

Shapes: N rows (outputs), I columns (inputs), J words a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec.config import Storage

LANES = {Storage.FLOAT32: 1, Storage.BFLOAT16: 2, Storage.INT8: 4}
"""How many weights one 32-bit word holds."""

_BLOCK_ROWS = 512  # rows packed at a time, which bounds the scratch: the token table is larger than a layer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """A matrix [N, I] as stored."""

    storage: Storage
    inputs: int
    word_NJ: Tensor
    """int32; float32 where storage is float32, whose words are the weights."""
    scale_N: Tensor | None
    """float32, for int8 only: weight = code * scale."""
    bias_N: Tensor | None = None
    """float32."""

    def to(self, device: torch.device) -> "Packed":
        moved = {name: getattr(self, name) for name in ("word_NJ", "scale_N", "bias_N")}
        moved = {name: None if tensor is None else tensor.to(device) for name, tensor in moved.items()}
        return Packed(storage=self.storage, inputs=self.inputs, **moved)


def pack(weight_NI: Tensor, storage: Storage, bias_N: Tensor | None = None) -> Packed:
    """Round a matrix of any float dtype to its storage and pack it; the result shares no memory with it.

    >>> pack(torch.tensor([[1.0, 2.0, 127.0, 4.0, 5.0]]), Storage.INT8).word_NJ.tolist()  # lanes (1,127,5,0), (2,4,0,0)
    [[360193, 1026]]
    """
    rows, inputs = weight_NI.shape
    words = -(-inputs // LANES[storage])
    dtype = torch.float32 if storage is Storage.FLOAT32 else torch.int32
    word_NJ = torch.empty(rows, words, dtype=dtype)
    scale_N = torch.empty(rows) if storage is Storage.INT8 else None
    for first in range(0, rows, _BLOCK_ROWS):
        block = slice(first, first + _BLOCK_ROWS)
        block_NI = weight_NI[block].to(torch.float32)
        if storage is Storage.FLOAT32:
            word_NJ[block] = block_NI
        elif storage is Storage.BFLOAT16:
            word_NJ[block] = pack_lanes(block_NI.to(torch.bfloat16).view(torch.int16), bits=16)
        else:
            code_NI, block_scale_N = quantise(block_NI)
            word_NJ[block] = pack_lanes(code_NI, bits=8)
            assert scale_N is not None
            scale_N[block] = block_scale_N
    bias_N = None if bias_N is None else bias_N.to(torch.float32, copy=True)
    return Packed(storage=storage, inputs=inputs, word_NJ=word_NJ, scale_N=scale_N, bias_N=bias_N)


def quantise(weight_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes and one float32 scale a row: scale = max|row| / 127, code = row / scale, half to even.

    A row of zeros has scale 0 and codes 0, and so has a row so small that its scale underflows.

    >>> quantise(torch.tensor([[254.0, -5.0, 3.0]]))[0].tolist()  # scale 2: 127, -2.5, 1.5
    [[127, -2, 2]]
    """
    weight_NI = weight_NI.to(torch.float32)
    scale_N = weight_NI.abs().amax(1) / 127
    code_NI = (weight_NI / scale_N[:, None]).round()
    code_NI = torch.where(scale_N[:, None] > 0, code_NI, 0).clamp(-127, 127)
    return code_NI.to(torch.int8), scale_N


def pack_lanes(code_NI: Tensor, bits: int) -> Tensor:
    """Integers of 8 or 16 bits, [N, I], as int32 words [N, J], planar.

    >>> [hex(word) for word in pack_lanes(torch.tensor([[0x11, 0x22, 0x33, 0x44, 0x55]]), bits=8)[0].tolist()]
    ['0x553311', '0x4422']
    """
    lanes = 32 // bits
    words = -(-code_NI.shape[1] // lanes)
    padded_NI = torch.nn.functional.pad(code_NI.to(torch.int32), (0, words * lanes - code_NI.shape[1]))
    word_NJ = torch.zeros(code_NI.shape[0], words, dtype=torch.int32)
    for lane in range(lanes):
        code_NJ = padded_NI[:, lane * words : (lane + 1) * words] & ((1 << bits) - 1)
        word_NJ |= code_NJ << (lane * bits)
    return word_NJ


def lane_values(word_NJ: Tensor, storage: Storage, lane: int) -> Tensor:
    """One lane of bit-cast words (`as_graph_input`), [N, J], as float32: for int8 the codes, otherwise the weights.

    Lane c, word j is column c * J + j. The first shift puts the lane's sign at the top, the second brings it down.

    >>> words = as_graph_input(pack(torch.tensor([[1.0, 2.0, 127.0, 4.0, 5.0]]), Storage.INT8))
    >>> lane_values(words, Storage.INT8, 1).tolist()
    [[127.0, 4.0]]
    """
    if storage is Storage.FLOAT32:
        return word_NJ
    word_NJ = word_NJ.view(torch.int32)
    if storage is Storage.BFLOAT16:  # a bfloat16 is the upper half of the float32 of equal value
        return (word_NJ << 16 if lane == 0 else word_NJ & -65536).view(torch.float32)
    lifted_NJ = word_NJ << (24 - 8 * lane) if lane < 3 else word_NJ
    return (lifted_NJ >> 24).to(torch.float32)


def unpack(word_NJ: Tensor, scale_N: Tensor | None, storage: Storage, inputs: int) -> Tensor:
    """The matrix [N, I] in float32 from bit-cast words; int8 codes times their scales."""
    lanes = [lane_values(word_NJ, storage, lane) for lane in range(LANES[storage])]
    if scale_N is not None:
        lanes = [lane_NJ * scale_N[:, None] for lane_NJ in lanes]  # before joining: one pass in a graph, not two
    return torch.cat(lanes, dim=1)[:, :inputs] if len(lanes) > 1 else lanes[0]


def as_graph_input(matrix: Packed) -> Tensor:
    """The words bit-cast to float32, over the same memory."""
    return own(matrix.word_NJ.view(torch.float32))


def own(contiguous: Tensor) -> Tensor:
    """The same memory as a tensor of its own: what enters a compiled region may not be a view."""
    bare = torch.empty(0, dtype=contiguous.dtype, device=contiguous.device)
    return bare.set_(contiguous.untyped_storage(), 0, contiguous.shape, contiguous.stride())
