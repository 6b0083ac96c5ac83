"""Weight matrices as packed words, and back.

Why it is faster: a decode step reads every weight once and does two operations with it, so it is as fast as memory;
fewer bytes a weight is more tokens a second. What it relies on: Inductor's CPU code loads float32 vectors directly but
integer vectors through a stack copy, so a `Matrix` holds its words as float32, and graphs bit-cast them back
(`place_values`). As float32 some words are NaN: compare words after `.view(torch.int32)`, never as they lie.

Words stand in blocks of U rows, the rows of a block side by side: [B, J, U]. So a vector holds words of U outputs,
one activation multiplies all of them, and no product ends with a sum across a vector. Float32 is not packed: its rows
are what torch's own matrix product reads.

Which column a word holds where:

- bfloat16 (2 a word) and int8 (4 a word) are planar: with C a word and J = ceil(I / C), place c of word j is column
  c * J + j.
- int4 (8 a word) keeps a group of 64 columns in 8 words: place c of word 8 * g + j is column 64 * g + 8 * c + j.

Columns past I and rows past N are zeros.

Shapes: N rows (outputs), I columns (inputs), B = ceil(N / U) blocks of U = 8 or 16 rows (`ROWS`), J words a row,
G groups a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..spec.config import INT4_GROUP, Storage
from ..spec.errors import RequestError

PLACES = {Storage.BFLOAT16: 2, Storage.INT8: 4, Storage.INT4: 8}
"""How many weights one 32-bit word holds."""

_LAST = PLACES[Storage.INT4] - 1

_RAISED_PLACES = 3

RAISED = 16.0**_RAISED_PLACES
"""By how much a product with int4 is raised while it is summed: the middle of what places raise codes by, so that
neither tiny nor huge activations leave float32's range early (they may be 5e-35 to 5e33 in size)."""

_capability: Callable[[], str] = torch.backends.cpu.get_cpu_capability  # untyped in torch

ROWS = 16 if _capability() == "AVX512" else 8
"""Rows of a block: the 32-bit words of one vector of this processor. Of a longer block a vector would take a part at a
time, so that each line of memory is fetched twice, a part each time."""

GROUP_WORDS = INT4_GROUP // PLACES[Storage.INT4]
"""Words that hold a group of int4."""

_PIECE_ROWS = 512  # rows packed at a time, which bounds the scratch: the token table is larger than a layer


class Matrix(NamedTuple):
    """A matrix [N, I] as stored, in the form that a graph takes."""

    word: Tensor
    """Words [B, J, U], bit-cast to float32; where storage is float32, the weights themselves, [N, I]."""
    scale_N: Tensor | None
    """float32, for int8 only: weight = quantized value * scale."""
    scale_BGU: Tensor | None
    """float32, for int4 only: weight = quantized value * scale + min, with values 0 .. 15 as in the reference."""
    min_BGU: Tensor | None
    """float32, for int4 only: the group's least weight."""
    bias_N: Tensor | None
    """float32."""
    outputs: int

    def to(self, device: torch.device) -> "Matrix":
        """Return the matrix on a device; parts that lie there already are not copied."""

        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return self._replace(
            word=self.word.to(device),
            scale_N=moved(self.scale_N),
            scale_BGU=moved(self.scale_BGU),
            min_BGU=moved(self.min_BGU),
            bias_N=moved(self.bias_N),
        )


class Quantized(NamedTuple):
    """A matrix [N, I] with the scales that its storage gives it, to be cut and packed.

    Cut first and packed then, its parts are stored as they are in the whole: int8 keeps the scales of whole rows, and
    int4 is cut on the borders of its groups. Values are rounded by `pack`, 512 rows at a time, so that a token table
    is never held a second time.
    """

    weight_NI: Tensor
    """Any float dtype, not yet rounded; cuts are views of it."""
    storage: Storage
    scale_N: Tensor | None
    """float32, for int8 only: those of whole rows, whichever columns are left."""

    def rows(self, begin: int, end: int) -> "Quantized":
        """Return rows begin .. end - 1."""
        _check_cut("rows", begin, end, self.weight_NI.shape[0])
        return self._replace(
            weight_NI=self.weight_NI[begin:end], scale_N=None if self.scale_N is None else self.scale_N[begin:end]
        )

    def columns(self, begin: int, end: int) -> "Quantized":
        """Return columns begin .. end - 1. Raises `RequestError` for a cut through a group of int4."""
        inputs = self.weight_NI.shape[1]
        _check_cut("columns", begin, end, inputs)
        if self.storage is Storage.INT4 and (begin % INT4_GROUP or (end % INT4_GROUP and end != inputs)):
            raise RequestError(
                f"columns {begin} to {end} of {inputs} cut a group of int4; "
                f"begin and end must be multiples of {INT4_GROUP}, or the end {inputs}"
            )
        return self._replace(weight_NI=self.weight_NI[:, begin:end])


def _check_cut(which: str, begin: int, end: int, size: int) -> None:
    if not 0 <= begin < end <= size:
        raise RequestError(f"{which} {begin} to {end} of {size}; must be 0 <= begin < end <= {size}")


AbsmaxOfRows = Callable[[Tensor], Tensor]
"""The absmax of whole rows, float32 [N], from that of the columns that are here."""


def quantize(weight_NI: Tensor, storage: Storage, of_rows: AbsmaxOfRows | None = None) -> Quantized:
    """Find the scales of a matrix of any float dtype, which the result does not copy.

    Where the matrix is some columns of another, `of_rows` tells what the absmax of that one's rows is.

    >>> whole = quantize(torch.tensor([[1.0, 2.0, 127.0], [3.0, 4.0, 254.0]]), Storage.INT8)
    >>> whole.columns(0, 2).scale_N  # not 2 / 127 and 4 / 127
    tensor([1., 2.])
    """
    if storage is not Storage.INT8:
        return Quantized(weight_NI, storage, None)
    scale_N = torch.empty(weight_NI.shape[0], dtype=torch.float32, device=weight_NI.device)
    for first in range(0, len(scale_N), _PIECE_ROWS):
        piece = slice(first, first + _PIECE_ROWS)
        scale_N[piece] = row_absmax(weight_NI[piece])
    return Quantized(weight_NI, storage, (scale_N if of_rows is None else of_rows(scale_N)) / 127)


def pack(quantized: Quantized, bias_N: Tensor | None = None) -> Matrix:
    """Round a matrix to its storage and pack it; the result shares no memory with it.

    >>> matrix = pack(quantize(torch.tensor([[1.0, 2.0, 127.0, 4.0, 5.0]]), Storage.INT8))
    >>> matrix.word.view(torch.int32)[0, :, 0].tolist()  # J = 2: places (1, 127, 5, 0) and (2, 4, 0, 0)
    [360193, 1026]
    """
    weight_NI, storage, scale_N = quantized
    outputs, inputs = weight_NI.shape
    bias_N = None if bias_N is None else bias_N.to(torch.float32, copy=True)
    if storage is Storage.FLOAT32:
        word = torch.empty(outputs, inputs, dtype=torch.float32, device=weight_NI.device)
        word.copy_(weight_NI)
        return Matrix(word, None, None, None, bias_N, outputs)
    blocks, groups = -(-outputs // ROWS), -(-inputs // INT4_GROUP)
    words = groups * GROUP_WORDS if storage is Storage.INT4 else -(-inputs // PLACES[storage])
    word_BJU = torch.empty(blocks, words, ROWS, dtype=torch.int32, device=weight_NI.device)
    scale_BGU = None
    if storage is Storage.INT4:
        scale_BGU = torch.empty(blocks, groups, ROWS, dtype=torch.float32, device=weight_NI.device)
    min_BGU = None if scale_BGU is None else torch.empty_like(scale_BGU)
    for first in range(0, outputs, _PIECE_ROWS):
        piece = slice(first, min(first + _PIECE_ROWS, outputs))
        block = slice(first // ROWS, -(-piece.stop // ROWS))
        piece_NI = weight_NI[piece].to(torch.float32)
        if storage is Storage.BFLOAT16:
            word_BJU[block] = in_blocks(pack_planar(piece_NI.to(torch.bfloat16).view(torch.int16), bits=16))
        elif storage is Storage.INT8:
            assert scale_N is not None
            word_BJU[block] = in_blocks(pack_planar(round_rows(piece_NI, scale_N[piece]), bits=8))
        else:
            quantized_NI, scale_NG, min_NG = quantize_groups(piece_NI)
            word_BJU[block] = in_blocks(pack_grouped(quantized_NI))
            assert scale_BGU is not None
            assert min_BGU is not None
            scale_BGU[block], min_BGU[block] = in_blocks(scale_NG), in_blocks(min_NG)
    scale_N = None if scale_N is None else scale_N.to(word_BJU.device, copy=True)
    return Matrix(own(word_BJU.view(torch.float32)), scale_N, scale_BGU, min_BGU, bias_N, outputs)


def quantize_rows(weight_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Return symmetric int8 values and one float32 scale a row.

    A row of zeros has scale 0 and values 0, and so has a row so small that its scale underflows.

    >>> quantize_rows(torch.tensor([[254.0, -5.0, 3.0]]))[0].tolist()  # scale 2: 127, -2.5, 1.5
    [[127, -2, 2]]
    """
    scale_N = row_scales(weight_NI)
    return round_rows(weight_NI, scale_N), scale_N


def row_scales(weight_NI: Tensor) -> Tensor:
    """Return max|row| / 127, float32 [N]."""
    return row_absmax(weight_NI) / 127


def row_absmax(weight_NI: Tensor) -> Tensor:
    """Return max|row|, float32 [N]."""
    return weight_NI.to(torch.float32).abs().amax(1)


def round_rows(weight_NI: Tensor, scale_N: Tensor) -> Tensor:
    """Return weight / scale rounded half to even, int8 in -127 .. 127; 0 where the scale is 0."""
    quantized_NI = (weight_NI.to(torch.float32) / scale_N[:, None]).round()
    quantized_NI = torch.where(scale_N[:, None] > 0, quantized_NI, 0).clamp(-127, 127)
    return quantized_NI.to(torch.int8)


def quantize_groups(weight_NI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Int4 codes 0 .. 15; each group's step = (max - low) / 15, low = min; code = (w - low) / step, half to even.

    A group of equal weights has step 0 and codes 0. The last group of a row may be short.

    >>> weight_NI = torch.tensor([[-1.0, 14.0, 0.5, 1.5]])  # scale 1: 0, 15, 1.5, 2.5
    >>> quantized_NI, scale_NG, min_NG = quantize_groups(weight_NI)
    >>> quantized_NI[0, :4].tolist(), scale_NG.tolist(), min_NG.tolist()
    ([0, 15, 2, 2], [[1.0]], [[-1.0]])
    """
    inputs = weight_NI.shape[1]
    whole = torch.arange(-(-inputs // INT4_GROUP) * INT4_GROUP, device=weight_NI.device)
    filled_NI = weight_NI.to(torch.float32)[:, whole.clamp_max(inputs - 1)]  # the last again: no new least or largest
    group_NGC = filled_NI.view(len(filled_NI), -1, INT4_GROUP)
    min_NG, max_NG = group_NGC.aminmax(dim=2)
    scale_NG = (max_NG - min_NG) / 15
    divisor_NG1 = torch.where(scale_NG > 0, scale_NG, torch.inf)[:, :, None]
    quantized_NGC = ((group_NGC - min_NG[:, :, None]) / divisor_NG1).round().nan_to_num(0.0).clamp(0, 15)
    return quantized_NGC.flatten(1)[:, :inputs].to(torch.int8), scale_NG, min_NG


def pack_planar(quantized_NI: Tensor, bits: int) -> Tensor:
    """Integers of 8 or 16 bits, [N, I], as int32 words [N, J], planar.

    >>> [hex(word) for word in pack_planar(torch.tensor([[0x11, 0x22, 0x33, 0x44, 0x55]]), bits=8)[0].tolist()]
    ['0x553311', '0x4422']
    """
    places = 32 // bits
    words = -(-quantized_NI.shape[1] // places)
    padded_NI = functional.pad(quantized_NI.to(torch.int32), (0, words * places - quantized_NI.shape[1]))
    return _joined(padded_NI.view(-1, places, words).unbind(1), bits)


def pack_grouped(quantized_NI: Tensor) -> Tensor:
    """Integers of 4 bits, [N, I], as int32 words [N, 8 G]: those of a group of 64 columns in 8 words.

    >>> words = pack_grouped((torch.arange(64) % 16)[None])[0]  # word 0: columns 0 8 16 .. 56
    >>> hex(words[0].item() & 0xFFFFFFFF), hex(words[1].item() & 0xFFFFFFFF)
    ('0x80808080', '0x91919191')
    """
    padded_NI = functional.pad(quantized_NI.to(torch.int32), (0, -quantized_NI.shape[1] % INT4_GROUP))
    places_N8GW = padded_NI.view(len(quantized_NI), -1, PLACES[Storage.INT4], GROUP_WORDS).transpose(1, 2)
    return _joined(places_N8GW.flatten(2).unbind(1), 4)


def _joined(places: tuple[Tensor, ...], bits: int) -> Tensor:
    word_NJ = torch.zeros_like(places[0])
    for place, quantized_NJ in enumerate(places):
        word_NJ |= (quantized_NJ & ((1 << bits) - 1)) << (place * bits)
    return word_NJ


def in_blocks(of_rows_NJ: Tensor) -> Tensor:
    """[N, J] as [B, J, U], with rows of zeros at the end.

    >>> in_blocks(torch.arange(6).view(3, 2))[0, :, :4].tolist()
    [[0, 2, 4, 0], [1, 3, 5, 0]]
    """
    padded_NJ = functional.pad(of_rows_NJ, (0, 0, 0, -len(of_rows_NJ) % ROWS))
    return padded_NJ.reshape(-1, ROWS, padded_NJ.shape[1]).transpose(1, 2)


def place_values(word: Tensor, storage: Storage, place: int, dtype: torch.dtype) -> Tensor:
    """Return what stands at one place of a `Matrix`'s words, in float32 or float64: quantized values, or weights.

    Of int8 the first shift puts the place's sign at the top of the word, the second brings it down.

    >>> matrix = pack(quantize(torch.tensor([[1.0, 2.0, 127.0, 4.0, 5.0]]), Storage.INT8))
    >>> place_values(matrix.word, Storage.INT8, 1, torch.float32)[0, :, 0].tolist()
    [127.0, 4.0]
    """
    word = word.view(torch.int32)
    if storage is Storage.BFLOAT16:  # a bfloat16 is the upper half of the float32 of equal value
        return (word << 16 if place == 0 else word & -65536).view(torch.float32).to(dtype)
    if storage is Storage.INT4:
        return raised_codes(word, place, dtype) * 16.0 ** -(place % _LAST)
    bits = 32 // PLACES[storage]
    lifted = word << (32 - bits * (place + 1)) if place < PLACES[storage] - 1 else word
    return (lifted >> (32 - bits)).to(dtype)


def raised_codes(word: Tensor, place: int, dtype: torch.dtype) -> Tensor:
    """Return the int4 values that stand at one place, times 16 ** place: masked where they stand, not shifted.

    The last place holds a word's sign, so it alone is brought down.
    """
    word = word.view(torch.int32)
    return (word >> 28 & 15 if place == _LAST else word & 15 << 4 * place).to(dtype)


def lowering(device: torch.device) -> Tensor:
    """What makes code * `RAISED` of those, for each place, float32 [C]: powers of two, made of their exponents' bits.

    >>> (lowering(torch.device("cpu")) / RAISED).log2().tolist()
    [0.0, -4.0, -8.0, -12.0, -16.0, -20.0, -24.0, 0.0]
    """
    place_C = torch.arange(PLACES[Storage.INT4], dtype=torch.int32, device=device)
    exponent_C = 127 + 4 * (_RAISED_PLACES - place_C % _LAST)  # the last place is not raised, as the first
    return (exponent_C << 23).view(torch.float32)


def columns_of(
    word_BJU: Tensor,
    scale_BU: Tensor | None,
    scale_BGU: Tensor | None,
    min_BGU: Tensor | None,
    storage: Storage,
    dtype: torch.dtype,
) -> Tensor:
    """Return the transposed weights in float32 or float64, [I, N] and what fills up both, from bit-cast words.

    Transposed, because so the 16 weights of a vector are neighbors, as they are in the words.
    """
    places = [place_values(word_BJU, storage, place, dtype).transpose(0, 1) for place in range(PLACES[storage])]
    if scale_BU is not None:
        places = [quantized_JBU * scale_BU for quantized_JBU in places]
    if scale_BGU is None or min_BGU is None:
        return torch.cat(places).flatten(1)
    scale_G1BU, min_G1BU = (each.transpose(0, 1)[:, None] for each in (scale_BGU, min_BGU))
    grouped = [
        quantized_JBU.view(-1, GROUP_WORDS, *quantized_JBU.shape[1:]) * scale_G1BU + min_G1BU
        for quantized_JBU in places
    ]
    return torch.stack(grouped, 1).flatten(3).flatten(0, 2)


def weights_of_rows(
    word_TJ: Tensor,
    scale_T: Tensor | None,
    scale_TG: Tensor | None,
    min_TG: Tensor | None,
    storage: Storage,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the weights [T, I] of some rows in float32 or float64, from their bit-cast words, scales and minima."""
    places = [place_values(word_TJ, storage, place, dtype) for place in range(PLACES[storage])]
    if scale_T is not None:
        places = [
            quantized_TJ * scale_T[:, None] for quantized_TJ in places
        ]  # before joining: one pass in a graph, not two
    if scale_TG is None or min_TG is None:
        return torch.cat(places, dim=1)[:, :inputs]
    scale_TG1, min_TG1 = scale_TG[:, :, None], min_TG[:, :, None]
    grouped = [
        quantized_TJ.reshape(len(quantized_TJ), -1, GROUP_WORDS) * scale_TG1 + min_TG1 for quantized_TJ in places
    ]
    return torch.stack(grouped, dim=2).flatten(1)[:, :inputs]


def own(contiguous: Tensor) -> Tensor:
    """Return the same memory as a tensor that is no view: what enters a graph as a view drags its base along.

    Part of a buffer stays at its place there:

    >>> own(torch.arange(6)[2:4]).tolist()
    [2, 3]
    """
    bare = torch.empty(0, dtype=contiguous.dtype, device=contiguous.device)
    place = contiguous.storage_offset(), contiguous.shape, contiguous.stride()
    return bare.set_(contiguous.untyped_storage(), *place)
