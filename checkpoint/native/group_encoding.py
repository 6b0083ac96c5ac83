"""Int4 codes in a file: two to a byte, beside the least and the largest weight of each group.

As ZeRO-Inference keeps them: of each two codes of a row, the one at the even index lies in the high four bits. A row of
an odd number ends in four bits of zero.

The step of a group, (high - low) / 15, cannot give back `high`, from which alone it follows again bit by bit; so the
file holds `low` and `high`, and a group's weights become

    low where code is 0        high where code is the group's largest        else code * step + low

Those in between quantize to their code again: rounding to float32 moves them by less than half a step or, where
float32 is coarser than the step, back to the weight that the code came from.

Shapes: N rows, I columns, G groups of a row, C columns of a group, W = ceil(I / 2) bytes of a row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...spec.config import INT4_GROUP
from ...spec.errors import WeightError


def encoded_groups(
    weight_NI: Tensor, quantize: Callable[[Tensor], Tensor], name: str = "weight_NI"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values as bytes [N, W], and the least and largest weight of each group, [N, G], of a float32 matrix.

    Raises `WeightError` where a group holds something not finite, or its range is not.

    >>> values_NI = torch.tensor([[0, 15, 2, 10, 3]])
    >>> byte_NW, min_NG, max_NG = encoded_groups(torch.tensor([[0.0, 15.0, 2.5, 10.0, 3.0]]), lambda weight: values_NI)
    >>> [hex(byte) for byte in byte_NW[0].tolist()], min_NG.tolist(), max_NG.tolist()
    (['0xf', '0x2a', '0x30'], [[0.0]], [[15.0]])
    """
    weight_NGC = _in_groups(weight_NI)
    min_NG, max_NG = weight_NGC.amin(-1), weight_NGC.amax(-1)
    range_NG = max_NG - min_NG
    if not bool(range_NG.isfinite().all()):
        row = int((~range_NG.isfinite()).nonzero()[0, 0])
        raise WeightError(
            f"{name} holds weights from {float(weight_NI[row].amin())} to {float(weight_NI[row].amax())} in row {row}; "
            f"int4 keeps finite numbers only, and no more than {torch.finfo(torch.float32).max:.3g} apart"
        )
    return _two_to_a_byte(quantize(weight_NI).to(torch.uint8)), min_NG, max_NG


def dequantized_groups(byte_NW: Tensor, min_NG: Tensor, max_NG: Tensor, inputs: int) -> Tensor:
    """Return float32 numbers [N, inputs] that quantize to these very values and scales.

    >>> byte_NW = torch.tensor([[0x0F, 0x2A, 0x30]], dtype=torch.uint8)
    >>> dequantized_groups(byte_NW, torch.tensor([[0.0]]), torch.tensor([[15.0]]), inputs=5)
    tensor([[ 0., 15.,  2., 10.,  3.]])
    """
    quantized_NI = torch.stack((byte_NW >> 4, byte_NW & 15), -1).flatten(1)[:, :inputs]
    quantized_NGC = _in_groups(quantized_NI)
    min_NG1, high_NG1 = min_NG[..., None], max_NG[..., None]
    weight_NGC = quantized_NGC.to(torch.float32) * ((high_NG1 - min_NG1) / 15) + min_NG1
    largest_NG1 = quantized_NGC.amax(-1, keepdim=True)
    weight_NGC = torch.where(quantized_NGC == largest_NG1, high_NG1, weight_NGC)
    return torch.where(quantized_NGC == 0, min_NG1, weight_NGC).flatten(1)[:, :inputs]


def _in_groups(each_NI: Tensor) -> Tensor:
    """[N, G, C]; what the last group lacks repeats the row's last element."""
    inputs = each_NI.shape[1]
    lacking = -inputs % INT4_GROUP
    filled_NI = torch.cat((each_NI, each_NI[:, -1:].expand(-1, lacking)), 1)
    return filled_NI.view(len(filled_NI), -1, INT4_GROUP)


def _two_to_a_byte(quantized_NI: Tensor) -> Tensor:
    even_NI = torch.nn.functional.pad(quantized_NI, (0, quantized_NI.shape[1] % 2))
    return (even_NI[:, 0::2] << 4) | even_NI[:, 1::2]
