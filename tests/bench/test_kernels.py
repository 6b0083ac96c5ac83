"""Kernels are counted and timed where generated code calls them."""

import pytest
import torch
from torch import Tensor

from twinfer.bench.kernels import Kernel, Kernels, watched


def test_kernels_of_a_compiled_function_are_counted_and_timed() -> None:
    """Two passes over x that cannot be one: a sum of all, then something of the sum."""

    def normalized(x: Tensor) -> Tensor:
        return x / x.sum()

    x = torch.rand(200_000)
    with watched() as kernels:
        program = torch.compile(normalized, fullgraph=True, options={"cpp.threads": 2})
        program(x)
        kernels.forget()
        for _ in range(3):
            program(x)
    called = [kernel for kernel in kernels.each if kernel.calls]
    assert {kernel.calls for kernel in called} == {3}
    assert sum(kernel.loops for kernel in called) == 2
    assert 0 < kernels.seconds < 10
    kernels.forget()
    assert kernels.seconds == 0
    program(x)
    assert kernels.seconds > 0  # also after the watch


def test_nothing_is_left_patched() -> None:
    from torch._inductor.async_compile import AsyncCompile

    before = AsyncCompile.cpp_pybinding
    with watched():
        assert AsyncCompile.cpp_pybinding is not before
    assert AsyncCompile.cpp_pybinding is before


def test_loops_of_a_layer_are_those_of_kernels_called_more_than_once_a_step() -> None:
    """Two steps of five layers: a kernel before them, two of the layers, one of them of but two layers."""
    kernels = Kernels([Kernel(3, calls=2), Kernel(4, calls=10), Kernel(5, calls=4), Kernel(9)])
    assert kernels.loops_a_layer(steps=2, layers=5) == (4 * 10 + 5 * 4) / 10
    assert kernels.loops_a_layer(steps=2, layers=1) is None


@pytest.mark.parametrize("seconds", [0.25, 0.5])
def test_seconds_are_those_of_all_kernels(seconds: float) -> None:
    assert Kernels([Kernel(1, seconds=seconds), Kernel(2, seconds=1.0)]).seconds == 1.0 + seconds
