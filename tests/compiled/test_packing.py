"""Packed words hold what they should, bit by bit, and the products read them as what they hold."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from twinfer.compiled import linear
from twinfer.compiled.head import head_prefill
from twinfer.compiled.linear import linear_decode, linear_prefill, lookup, passes
from twinfer.compiled.packing import Matrix, pack, place_values, quantize
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 19) | st.sampled_from([63, 64, 65, 130])
storages = st.sampled_from(Storage)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(seed: int, *shape: int) -> Tensor:
    """Small integers: every partial sum of their products is exact, so order does not matter."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def bits(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return values


def of_step_1(weight_NI: Tensor) -> Tensor:
    """Integers that int4 holds exactly: groups from -7 to 8, and one of a single column, which is its least."""
    weight_NI = weight_NI.clamp(-7, 8)
    weight_NI[:, ::64], weight_NI[:, 1::64] = -7, 8
    return weight_NI


def expanded(matrix: Matrix, storage: Storage, inputs: int) -> Tensor:
    return linear.expanded(matrix, storage, inputs, torch.float32)


def packed(weight_NI: Tensor, storage: Storage, bias_N: Tensor | None = None) -> Matrix:
    return pack(quantize(weight_NI, storage), bias_N)


def stored(weight_NI: Tensor, storage: Storage) -> Tensor:
    """What a matrix is after storage, by numpy, element by element."""
    if storage is Storage.FLOAT32:
        return weight_NI.float()
    out = np.zeros(weight_NI.shape, np.float32)
    if storage is Storage.INT4:
        return torch.from_numpy(in_groups(weight_NI.float().numpy()))
    for row, values in enumerate(weight_NI.float().numpy()):
        scale = np.abs(values).max() / np.float32(127)
        for column, value in enumerate(values):
            if storage is Storage.INT8:
                out[row, column] = np.rint(value / scale) * scale if scale > 0 else 0
            else:  # nearest bfloat16, ties to the one whose last bit is zero
                word = int(value.view(np.uint32))
                low, upper = word & 0xFFFF, word >> 16
                upper += low > 0x8000 or (low == 0x8000 and upper % 2 == 1)
                out[row, column] = np.uint32(upper << 16).view(np.float32)
    return torch.from_numpy(out)


def in_groups(weight_NI: np.ndarray) -> np.ndarray:
    """Int4, group by group: code * step + least, each operation in float32, as a graph has it."""
    out = np.zeros_like(weight_NI)
    for row, first in np.ndindex(weight_NI.shape[0], -(-weight_NI.shape[1] // 64)):
        group = weight_NI[row, 64 * first : 64 * first + 64]
        step = (group.max() - group.min()) / np.float32(15)
        codes = np.rint((group - group.min()) / step) if step > 0 else np.zeros_like(group)
        out[row, 64 * first : 64 * first + 64] = codes.clip(0, 15) * step + group.min()
    return out


@given(seed=seeds, rows=sizes, inputs=sizes, storage=storages, spread=st.sampled_from([1e-30, 1.0, 1e30]))
def test_unpacking_gives_what_is_stored(seed: int, rows: int, inputs: int, storage: Storage, spread: float) -> None:
    """Codes, scales and roundings by a brute-force reimplementation; a row of zeros among them."""
    weight_NI = normal(seed, rows, inputs) * spread
    weight_NI[0] *= 0
    unpacked = expanded(packed(weight_NI, storage), storage, inputs)
    assert bits(unpacked + 0.0) == bits(stored(weight_NI, storage) + 0.0)  # + 0.0: code 0 has no sign


@given(seed=seeds, rows=sizes, inputs=sizes, storage=storages)
def test_packing_again_changes_nothing(seed: int, rows: int, inputs: int, storage: Storage) -> None:
    """Stored values are a fixed point; in int8 and int4 where the scale or step is exact, 1/8 here."""
    weight_NI = stored(normal(seed, rows, inputs), storage)
    if storage is Storage.INT8:
        weight_NI = torch.cat([integers(seed, rows, inputs), torch.full((rows, 1), 127.0)], 1) / 8
    if storage is Storage.INT4:
        weight_NI = of_step_1(integers(seed, rows, inputs)) / 8
    unpacked = expanded(packed(weight_NI, storage), storage, weight_NI.shape[1])
    assert bits(unpacked + 0.0) == bits(weight_NI + 0.0)


def test_halves_round_to_even() -> None:
    words_BJU = packed(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]), Storage.INT8).word
    codes = torch.cat([place_values(words_BJU, Storage.INT8, place, torch.float32)[0] for place in range(4)])
    assert codes[:7, 0].tolist() == [127, 0, 2, 2, 0, -2, -2]


def test_words_keep_every_bit_where_they_are_no_numbers() -> None:
    """As float32 this word is NaN, and still the same integer in a copy; packing shares no memory with its input."""
    weight_NI = torch.tensor([[-1.0, 1.0, -127.0, 127.0]])
    first = packed(weight_NI, Storage.INT8)
    for matrix in (first, first.to(torch.device("cpu"))._replace(word=first.word.clone())):
        assert matrix.word.view(torch.int32)[0, 0, 0].item() == 0x7F8101FF  # a signaling NaN
    plain = packed(weight_NI, Storage.FLOAT32)
    weight_NI.zero_()
    assert plain.word.tolist() == [[-1.0, 1.0, -127.0, 127.0]]


@pytest.mark.parametrize("storage", list(Storage))
def test_a_callers_default_dtype_changes_nothing(storage: Storage) -> None:
    """Words and scales are float32 also where new tensors are float64 by default."""
    weight_NI, default = normal(0, 20, 130), packed(normal(0, 20, 130), storage)
    torch.set_default_dtype(torch.float64)
    try:
        other = packed(weight_NI, storage)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(default, other, strict=True):
        assert same_bits(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def of_size(rows: int, inputs: int, outputs: int, storage: Storage, many_registers: bool = True) -> Any:
    """An example large enough for several parts at once, or for pieces of the inputs."""
    sizes = {"rows": rows, "inputs": inputs, "outputs": outputs}
    return example(seed=0, storage=storage, bias=True, many_registers=many_registers, power=0, **sizes)


@of_size(1, 2100, 64, Storage.INT4)
@of_size(1, 70, 64, Storage.INT4, many_registers=False)
@of_size(4, 70, 64, Storage.INT8)
@of_size(4, 2112, 20, Storage.FLOAT32)
@of_size(4, 4112, 6, Storage.FLOAT32)
@of_size(4, 2100, 5, Storage.FLOAT32)  # which no vector divides
@given(
    seed=seeds,
    rows=st.integers(1, 6),
    inputs=sizes,
    outputs=sizes,
    storage=storages,
    bias=st.booleans(),
    many_registers=st.booleans(),
    power=st.sampled_from([0, -96, 96]),
)
def test_products_read_the_stored_matrix(
    seed: int,
    rows: int,
    inputs: int,
    outputs: int,
    storage: Storage,
    bias: bool,
    many_registers: bool,
    power: int,
) -> None:
    """On integers every form is exact: few rows, many, the head in blocks; and so it is on tiny and huge multiples."""
    weight_NI = integers(seed, outputs, inputs)
    weight_NI[:, 0] = 127  # int8 scale 1
    if storage is Storage.INT4:
        weight_NI = of_step_1(weight_NI)
    x_RI, bias_N = integers(seed + 1, rows, inputs), integers(seed + 2, outputs) if bias else None
    right_RN = (x_RI @ weight_NI.T + (0 if bias_N is None else bias_N)) * 2.0**power
    x_RI, bias_N = x_RI * 2.0**power, None if bias_N is None else bias_N * 2.0**power
    matrix = packed(weight_NI, storage, bias_N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_MANY_REGISTERS", many_registers)
        assert torch.equal(linear_decode(x_RI, matrix, storage), right_RN)
        in_passes = torch.cat([linear_decode(x_RI[given], matrix, storage) for given in passes(rows, storage)])
    assert torch.equal(in_passes[:rows], right_RN)
    assert torch.equal(linear_prefill(x_RI, matrix, storage), right_RN)
    assert torch.equal(head_prefill(x_RI, matrix, storage, block_weights=20 * inputs), right_RN)


@pytest.mark.parametrize("power", [-100, 100])
def test_tiny_and_huge_activations_round_as_others_do(power: int) -> None:
    """Int4's are lowered where its codes stand high in their words: not so far that bits are lost."""
    matrix, x_RI = packed(normal(0, 20, 130), Storage.INT4), normal(1, 2, 130)
    scaled_RN = linear_decode(x_RI * 2.0**power, matrix, Storage.INT4)
    assert bits(scaled_RN) == bits(linear_decode(x_RI, matrix, Storage.INT4) * 2.0**power)


@given(seed=seeds, tokens=st.integers(1, 6), vocabulary=sizes, hidden=sizes, storage=storages)
def test_lookup_gives_stored_rows(seed: int, tokens: int, vocabulary: int, hidden: int, storage: Storage) -> None:
    table = normal(seed, vocabulary, hidden)
    token_T = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    looked_up = lookup(token_T, packed(table, storage), storage, hidden, torch.float32)
    assert bits(looked_up + 0.0) == bits(stored(table, storage)[token_T] + 0.0)


@pytest.mark.parametrize("storage", list(Storage))
def test_blocks_do_not_show(storage: Storage) -> None:
    """Matrices are packed in blocks of rows: one with a ragged last block equals its rows packed alone."""
    weight_NI = normal(0, 512 * 2 + 3, 5)
    whole, tail = packed(weight_NI, storage), packed(weight_NI[1008:], storage)
    assert bits(expanded(whole, storage, 5)[1008:]) == bits(expanded(tail, storage, 5))


@given(
    seed=seeds,
    rows=st.integers(2, 40),
    inputs=st.integers(2, 200),
    storage=storages,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    transposed=st.booleans(),
    data=st.data(),
)
def test_slices_are_stored_as_in_the_whole(
    seed: int, rows: int, inputs: int, storage: Storage, dtype: torch.dtype, transposed: bool, data: st.DataObject
) -> None:
    """Rows or columns cut after quantizing and packed one by one hold, put together, the bits of the whole matrix."""
    weight_NI = normal(seed, rows, inputs).to(dtype)
    if transposed:
        weight_NI = weight_NI.t().contiguous().t()
    whole = quantize(weight_NI, storage)
    whole_NI = expanded(pack(whole), storage, inputs)

    row = data.draw(st.integers(1, rows - 1))
    by_rows = [whole.rows(0, row), whole.rows(row, rows)]
    assert bits(torch.cat([expanded(pack(each), storage, inputs) for each in by_rows])) == bits(whole_NI)

    border = 64 if storage is Storage.INT4 else 1
    if inputs > border:
        column = data.draw(st.integers(1, (inputs - 1) // border)) * border
        by_columns = [(whole.columns(0, column), column), (whole.columns(column, inputs), inputs - column)]
        parts = [expanded(pack(each), storage, width) for each, width in by_columns]
        assert bits(torch.cat(parts, 1)) == bits(whole_NI)
        corner = expanded(pack(whole.rows(row, rows).columns(column, inputs)), storage, inputs - column)
        assert bits(corner) == bits(whole_NI[row:, column:])


@pytest.mark.parametrize(
    ("begin", "end", "message"),
    [
        (32, 130, "columns 32 to 130 of 130 cut a group of int4; begin and end must be multiples of 64"),
        (64, 100, "columns 64 to 100 of 130 cut a group of int4; begin and end must be multiples of 64"),
        (64, 131, "columns 64 to 131 of 130; must be 0 <= begin < end <= 130"),
        (-64, 64, "columns -64 to 64 of 130; must be"),
        (64, 64, "columns 64 to 64 of 130; must be"),
    ],
)
def test_cuts_that_store_something_else_are_refused(begin: int, end: int, message: str) -> None:
    """A slice of a tensor would take all of these, and silently give other values or none."""
    with pytest.raises(RequestError, match=re.escape(message)):
        quantize(normal(0, 3, 130), Storage.INT4).columns(begin, end)
    with pytest.raises(RequestError, match="rows 2 to 4 of 3; must be 0 <= begin < end <= 3"):
        quantize(normal(0, 3, 130), Storage.INT4).rows(2, 4)
