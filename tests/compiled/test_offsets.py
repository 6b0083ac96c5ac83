"""Tensors that are parts of a buffer are read where they lie, eagerly and by compiled graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from twinfer.compiled.cpu_graph import CpuGraphs
from twinfer.compiled.linear import linear_decode, linear_prefill, materialized
from twinfer.compiled.packing import Matrix, own, pack, quantize
from twinfer.compiled.programs import graph
from twinfer.oracle.trial import same_bits
from twinfer.spec.config import Storage

ALIGNMENT = 64
ROWS, INPUTS, OUTPUTS = 2, 128, 20


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def into_buffer(matrix: Matrix, buffer: Tensor, begin: int) -> Matrix:
    """Return the matrix with every tensor a part of the buffer, one after the other from the byte `begin`."""
    parts: list[Tensor | int | None] = []
    for part in matrix:
        if isinstance(part, Tensor):
            part_of_buffer = buffer[begin : begin + part.nbytes].view(part.dtype).view(part.shape)
            part_of_buffer.copy_(part)
            begin += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
            parts.append(own(part_of_buffer))
        else:
            parts.append(part)
    return Matrix(*parts)  # type: ignore[arg-type]


def test_a_part_of_a_buffer_is_owned_where_it_lies() -> None:
    """The owned tensor holds the part's values, not the buffer's first ones, and shares its memory."""
    buffer = torch.arange(64.0)
    part = own(buffer[16:40].view(6, 4))
    assert part.tolist() == torch.arange(16.0, 40.0).view(6, 4).tolist()
    assert part._base is None
    part[0, 0] = -1.0
    assert buffer[16] == -1.0


@pytest.mark.parametrize("storage", list(Storage))
def test_compiled_products_read_matrices_where_they_lie(storage: Storage) -> None:
    """One program gives the bits of tensors of their own for matrices anywhere in a buffer, without compiling anew."""
    x_RI = normal(0, ROWS, INPUTS)
    buffer = torch.full((4 * OUTPUTS * INPUTS * 4,), 0x55, dtype=torch.uint8)

    def both(x_RI: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        return linear_decode(x_RI, matrix, storage), linear_prefill(x_RI, matrix, storage)

    compiled = graph(both, keep_guards=True)
    for seed, begin in ((1, 0), (2, 3 * ALIGNMENT), (3, 8192 + ALIGNMENT)):
        matrix = pack(quantize(normal(seed, OUTPUTS, INPUTS), storage), normal(seed + 10, OUTPUTS))
        with torch.compiler.set_stance("fail_on_recompile" if seed > 1 else "default"):
            alone, part = compiled(x_RI, matrix), compiled(x_RI, into_buffer(matrix, buffer, begin))
        assert all(map(same_bits, alone, part)), begin


PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows of a product": lambda x, w: functional.linear(x, w)[2:4],
    "a row": lambda x, w: functional.linear(x, w)[5],
    "rows of a sum": lambda x, w: (x + 1)[2:4],
    "rows of an input": lambda x, w: x[1:3],
    "half of a joined tensor": lambda x, w: torch.cat([x, x + 1])[6:],
    "some heads of one token": lambda x, w: functional.linear(x[:1], w).view(1, 2, 2)[:, 1:].transpose(0, 1),
    "the whole": lambda x, w: x * 2,
}


def test_parts_are_materialized_where_they_lie() -> None:
    """Of part of another tensor the compiled program reads that part, also where its input is part of a buffer."""

    def program(x: Tensor, w: Tensor) -> list[Tensor]:
        return [materialized(part(x, w)) * 3 for part in PARTS.values()]

    buffer = torch.arange(64.0)  # and every sum of its products is exact
    compiled = graph(program, keep_guards=True)
    for x in (buffer[:24].clone().view(6, 4), own(buffer[16:40].view(6, 4)), buffer[32:56].view(6, 4)):
        w = torch.arange(16.0).view(4, 4)
        for name, got in zip(PARTS, compiled(x, w), strict=True):
            assert torch.equal(got, PARTS[name](x, w) * 3), name


def test_a_recorded_step_moves_to_part_of_a_buffer() -> None:
    """A kernel's argument is found at its place in the new tensor, not at that place in the buffer around it."""
    old, buffer, calls = torch.arange(8.0), torch.arange(100.0, 164.0), []
    device = CpuGraphs()
    captured, _ = device.capture(lambda: torch.zeros(1), None)
    captured.calls = [(calls.append, (old[2:4],))]
    assert device.move(captured, [(old.data_ptr(), old.nbytes)], [buffer[16:24]])
    captured.replay()
    assert calls[0].tolist() == [118.0, 119.0]


def test_an_alias_is_of_memory_that_lies_in_order() -> None:
    """A part of a buffer has an alias; a tensor whose memory is in another order is refused."""
    buffer = torch.arange(16.0)
    assert CpuGraphs().alias(buffer[4:8].view(2, 2)).tolist() == [[4.0, 5.0], [6.0, 7.0]]
    with pytest.raises(AssertionError):
        CpuGraphs().alias(buffer.view(4, 4).t())
