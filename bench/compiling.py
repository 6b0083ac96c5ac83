"""Compiling a program while looking on: how long it took, what came of it, and whether it stayed compiled."""

import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import torch
from torch._dynamo import utils as dynamo
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch.utils import _pytree as pytree

from .columns import Arguments, Column
from .hooks import replaced

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
"""torch.compile with its options."""

_PARALLEL_LOOP = re.compile(r"#pragma omp for")
_LAUNCH = re.compile(r"\bextern_kernels\.\w+\(|^\s+\w+\.run\(", re.MULTILINE)
_number = count()


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, and what compiling it was like."""

    call: Callable[..., Any]
    cold_s: float
    warm_s: float
    graphs: int
    graph_breaks: tuple[str, ...]
    recompiles: int
    parallel_loops: int
    """In the generated C++, that is on a CPU, with more than one thread: with one, loops are not made parallel."""
    launches: int
    """In the generated Python: of Triton kernels and of libraries', that is on a GPU."""


@torch.no_grad()
def start_compiler(device: torch.device) -> None:
    """Compile something small, so that what the compiler does once a process is no program's compile time.

    On a CPU that is some seconds: its own imports, and a trial of the vector instructions.
    """
    with TemporaryDirectory() as folder, fresh_cache(dir=folder):
        torch.compile(lambda x: x + 1)(torch.ones(64, device=device))


def compile_program(compile: Compile, column: Column, copies: list[Arguments]) -> Compiled:
    """Compile it with empty caches, then once more with those filled, and run all copies through the second.

    Each time it is a function of its own, which torch.compile has not seen: nothing compiled before is thrown away.
    Call `start_compiler` once before. `copies` are the column's, on the device.
    """
    program, example = column.program, copies[0] if column.example is None else column.example
    for name, axes in column.varying.items():
        for leaf in pytree.tree_leaves(example[name]):
            torch._dynamo.mark_dynamic(leaf, axes)
    with TemporaryDirectory() as folder, fresh_cache(dir=folder):
        graphs_before, breaks_before = _graphs(), len(dynamo.graph_break_reasons)
        with _generated_code() as code:
            _, cold_s = _first_call(compile, program, example)
        graphs = _graphs() - graphs_before
        breaks = tuple(map(_described, dynamo.graph_break_reasons[breaks_before:]))
        compiled, warm_s = _first_call(compile, program, example)
        call = column.passes(compiled)
        graphs_before = _graphs()
        for arguments in copies:
            call(**arguments)
    return Compiled(
        call=call,
        cold_s=cold_s,
        warm_s=warm_s,
        graphs=graphs,
        graph_breaks=breaks,
        recompiles=_graphs() - graphs_before,
        parallel_loops=sum(len(_PARALLEL_LOOP.findall(text)) for text in code),
        launches=sum(len(_LAUNCH.findall(text)) for text in code),
    )


def _first_call(
    compile: Compile, program: Callable[..., Any], arguments: Arguments
) -> tuple[Callable[..., Any], float]:
    call = compile(_namesake(program))
    start = time.perf_counter()
    call(**arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return call, time.perf_counter() - start


def _namesake(program: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with code of its own: torch knows what it compiled by the code."""
    assert isinstance(program, FunctionType), "programs are plain functions"
    code = program.__code__.replace(co_name=f"{program.__name__}_{next(_number)}")
    own = FunctionType(code, program.__globals__, code.co_name, program.__defaults__, program.__closure__)
    own.__kwdefaults__ = program.__kwdefaults__
    return own


def _graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return int(dynamo.counters["stats"]["unique_graphs"])


@contextmanager
def _generated_code() -> Iterator[list[str]]:
    """Every program text that Inductor generates meanwhile, C++ kernels included."""
    code: list[str] = []
    with replaced(GraphLowering, "save_output_code", code.append):
        yield code


def _described(reason: Any) -> str:
    """file:line: the first line of why, of a graph break."""
    frames: list[traceback.FrameSummary] = reason.user_stack
    why = str(reason.reason).strip().splitlines()[0]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {why}" if frames else why
