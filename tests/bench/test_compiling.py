"""What is counted while a program is compiled."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twinfer.bench.columns import Arguments, Column
from twinfer.bench.compiling import Compile, Compiled, compile_program


def _with_a_break(x: Tensor) -> Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def _plain(x: Tensor) -> Tensor:
    return x * 2 + 1


def _eagerly(program: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(program, backend="eager", dynamic=False)
    return compiled


def counted(compile: Compile, program: Callable[..., Any], copies: list[Arguments]) -> Compiled:
    return compile_program(compile, Column(program=program, arguments=copies[0]), copies)


def test_breaks_are_named_by_their_line() -> None:
    compiled = counted(_eagerly, _with_a_break, [{"x": torch.ones(3)}])
    assert compiled.graphs == 2
    (where,) = compiled.graph_breaks
    line = _with_a_break.__code__.co_firstlineno + 2
    assert where.startswith(f"{__file__}:{line}: ")
    assert compiled.recompiles == 0
    assert compiled.call(x=torch.ones(3)).tolist() == [4.0, 4.0, 4.0]


def test_an_unbroken_program_is_one_graph() -> None:
    """However often it was compiled before, and whatever else was broken."""
    for _ in range(2):
        compiled = counted(_eagerly, _plain, [{"x": torch.ones(3)}, {"x": torch.zeros(3)}])
        assert (compiled.graphs, compiled.graph_breaks, compiled.recompiles) == (1, (), 0)


def test_copies_that_do_not_fit_the_program_are_counted() -> None:
    compiled = counted(_eagerly, _plain, [{"x": torch.ones(3)}, {"x": torch.ones(4)}, {"x": torch.ones(5)}])
    assert compiled.graphs == 1
    assert compiled.recompiles == 2


def test_what_was_compiled_before_stays_compiled() -> None:
    first = counted(_eagerly, _plain, [{"x": torch.ones(3)}])
    counted(_eagerly, _plain, [{"x": torch.ones(4)}])
    with torch.compiler.set_stance("fail_on_recompile"):
        first.call(x=torch.ones(3))


def test_parallel_loops_are_counted() -> None:
    """Two reductions one after the other are two loops; with one thread nothing is parallel."""

    def two_reductions(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)).abs().amax(0)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        both = counted(torch.compile, two_reductions, [{"x": torch.ones(512, 512)}])
        torch.set_num_threads(1)
        alone = counted(torch.compile, two_reductions, [{"x": torch.ones(512, 512)}])
    finally:
        torch.set_num_threads(threads)
    assert both.parallel_loops == 2
    assert alone.parallel_loops == 0
    assert both.warm_s < both.cold_s


def test_varying_lengths_are_served_by_the_program_of_the_example() -> None:
    column = Column(program=_plain, arguments={"x": torch.ones(3)}, varying={"x": (0,)}, example={"x": torch.ones(24)})
    compiled = compile_program(_eagerly, column, [{"x": torch.ones(3)}, {"x": torch.ones(5)}])
    assert (compiled.graphs, compiled.recompiles) == (1, 0)
    assert compiled.call(x=torch.ones(2)).tolist() == [3.0, 3.0]
