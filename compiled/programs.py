"""The programs as compiled graphs: compiled once with every size dynamic, then called with none of torch's guards.

Why it is faster: checking the properties of some hundreds of weights at each call costs about as much as a layer. The
checks can go because `path` alone makes the arguments: weights never change, sizes that change are marked dynamic (the
marking fails if the graph were special to one), and everything else that torch would check is pinned by `pinned`.
Tests compile with the guards kept, and run every shape under `fail_on_recompile`.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False, "assert_indirect_indexing": False}
"""Inductor's run-time checks of what the path has checked already; given for these graphs, not set globally."""


_compile: Callable[..., Any] = torch.compile  # its type stub does not know isolate_recompiles


CAPTURING: dict[str, Any] = {"triton.cudagraphs": True}
"""What `torch.compile(mode="reduce-overhead")` stands for; a mode cannot be given beside options."""


def graph(program: Callable[..., Any], *, keep_guards: bool = False, capturing: bool = False) -> Callable[..., Any]:
    """The program under torch.compile; nothing is compiled before its first call. `capturing`: with CUDA graphs."""
    options = OPTIONS | CAPTURING if capturing else dict(OPTIONS)
    if not keep_guards:
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    # Programs of other paths share this one's code: without guards, only isolation keeps their graphs apart. And with
    # dynamic=None a float that another path's config has otherwise would be traced as a variable.
    compiled: Callable[..., Any] = _compile(
        program, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True
    )
    return compiled


def region(layer: Callable[..., Tensor], kind: int) -> Callable[..., Tensor]:
    """A layer function that is compiled once for all its uses in a graph; `kind` tells a graph's regions apart.

    torch knows a region by its function's code. Layers of different configs are closures over the same code, and where
    they differ in numbers alone (a window, a scale), torch 2.13 takes the first one's graph for all of them: so each
    gets code of its own, equal but for its name.
    """
    assert isinstance(layer, FunctionType)
    code = layer.__code__.replace(co_name=f"{layer.__name__}_{kind}")
    own = FunctionType(code, layer.__globals__, code.co_name, layer.__defaults__, layer.__closure__)
    compiled: Callable[..., Tensor] = torch.compiler.nested_compile_region(own)
    return compiled


def as_is(layer: Callable[..., Tensor], kind: int) -> Callable[..., Tensor]:
    """In place of `region`, for programs that are not compiled."""
    return layer


def dynamic(*tensors: Tensor) -> None:
    """Say that the first dimension of these varies from call to call."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Run with this many threads, float32 as default dtype, no autograd, inference mode or autocast; then as before."""
    threads_before, dtype_before = torch.get_num_threads(), torch.get_default_dtype()
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            if threads_before != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(torch.float32)
            yield
        finally:
            torch.set_default_dtype(dtype_before)
            if threads_before != threads:
                torch.set_num_threads(threads_before)
