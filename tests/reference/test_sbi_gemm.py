"""How the small-batch product divides its work, and that its layout moves weights and changes none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinfer.reference.sbi_gemm import LANES, WARPS, interleave, sbi_gemm, tiling
from twinfer.spec.errors import RequestError


@given(outputs=st.integers(1, 20_000), lines=st.integers(1, 9000), blocks=st.integers(1, 300))
def test_work_is_divided_among_enough_blocks_and_no_more_than_needed(outputs: int, lines: int, blocks: int) -> None:
    divided = tiling(outputs, lines, blocks)
    tiles = -(-outputs // divided.tile)
    assert divided.tile % LANES == 0
    assert tiles * divided.sections >= blocks or (divided.tile, divided.sections) == (LANES, max(lines // WARPS, 1))
    assert (divided.tile + LANES) * blocks > outputs
    if divided.sections > 1:
        assert tiles * (divided.sections - 1) < blocks
        assert lines // divided.sections >= WARPS


@given(
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 5),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.int8]),
)
def test_a_line_holds_whole_lanes_of_consecutive_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Element (k, n) is at line k // M, column n * M + k % M, with M = 2 for 16 bits and 4 for int8; the rest is 0."""
    rows = 4 // dtype.itemsize
    weight_KN = torch.arange(1, inputs * outputs + 1).reshape(inputs, outputs).to(dtype)
    line_LX = interleave(weight_KN, rows)
    for k in range(inputs):
        for n in range(outputs):
            assert line_LX[k // rows, n * rows + k % rows] == weight_KN[k, n]
    assert int((line_LX != 0).sum()) == inputs * outputs


def test_less_than_a_block_is_refused() -> None:
    with pytest.raises(RequestError, match="blocks is 0; it must be at least 1"):
        sbi_gemm(torch.ones(1, 2), torch.ones(2, 3), blocks=0)
