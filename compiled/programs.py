"""Pieces of programs as compiled graphs: compiled once with every size dynamic, then called without torch's guards.

Why it is faster: checking the properties of all of a layer's weights at each call costs much of what a small layer
costs. The checks can go because `path` alone makes the arguments: weights never change, sizes that change are marked
dynamic (the marking fails if the graph were special to one), and everything else that torch would check is pinned by
`pinned`. Tests compile with the guards kept, and run every shape under `fail_on_recompile`.
"""

import contextlib
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .artifacts import KERNELS, load_or_compile
from .cpu_graph import kernels_noticed
from .steps import DynamicDims, P, R


class Program(StrEnum):
    """The programs of a path, by the names that it reports."""

    PREFILL = "prefill"
    DECODE = "decode"
    """For one sequence."""
    DECODE_ROWS = "decode rows"
    """For the few sequences that share a pass over the weights."""
    DECODE_MANY = "decode many"
    """For any number of more sequences."""
    ENCODE = "encode"


OPTIONS: dict[str, Any] = {
    "size_asserts": False,
    "alignment_asserts": False,
    "assert_indirect_indexing": False,
    **KERNELS,
}
"""For these graphs, not set globally; the first three are checks at run time of what the path has checked already."""

_compile: Callable[..., Any] = torch.compile  # its type stub does not know isolate_recompiles


def graph(function: Callable[..., Any], *, keep_guards: bool = False) -> Callable[..., Any]:
    """Return the function under torch.compile; nothing is compiled before its first call."""
    options = dict(OPTIONS)
    if not keep_guards:
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    # Pieces of other paths share this one's code: without guards, only isolation keeps their graphs apart. And with
    # dynamic=None a float that another path's config has otherwise would be traced as a variable.
    compiled: Callable[..., Any] = _compile(
        function, fullgraph=True, dynamic=False, options=options, isolate_recompiles=True
    )
    return compiled


class Pieces:
    """Makes the pieces of one program; each is compiled, or found in the cache, when it first meets arguments.

    `described` says what the arguments do not: which program, and config and storage. `on_compile` is called with a
    few words that say why a piece has to be compiled.
    """

    def __init__(self, described: str, on_compile: Callable[[str], None], *, keep_guards: bool = False) -> None:
        self._described = described
        self._on_compile = on_compile
        self._keep_guards = keep_guards
        self._made = 0

    def __call__(self, function: Callable[P, R], dynamic: DynamicDims) -> Callable[P, R]:
        program = graph(function, keep_guards=self._keep_guards)
        described = f"{self._described} {self._made} {function.__name__}"
        self._made += 1
        compiled: Callable[..., Any] | None = None

        def piece(*arguments: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                mark_dynamic(function, arguments, dynamic)
                with kernels_noticed():
                    fresh = self._keep_guards  # whether a kept program keeps guards is not known
                    compiled = program if fresh else load_or_compile(program, arguments, described, self._on_compile)
                    return compiled(*arguments)
            return compiled(*arguments)

        return cast(Callable[P, R], piece)


def mark_dynamic(function: Callable[..., Any], arguments: tuple[Any, ...], dynamic: DynamicDims) -> None:
    """Mark the dimensions that change from call to call. Raises `KeyError` where the function has no such argument."""
    named = inspect.signature(function).bind(*arguments).arguments
    for name, dims in dynamic.items():
        for each in pytree.tree_leaves(named[name]):
            if isinstance(each, Tensor):
                for dim in dims:
                    torch._dynamo.mark_dynamic(each, dim)


class pinned:
    """Run with this many threads, float32 as default dtype, no autograd, inference mode or autocast; then as before.

    What is so already is not set again, and autograd alone not through a stack: that takes a while at every step.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._before: contextlib.ExitStack | None = None
        self._grad = False
        """Whether autograd alone is to be put back."""

    def __enter__(self) -> None:
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        others = torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu")
        if not others and threads == self._threads and dtype is torch.float32:
            self._grad = torch.is_grad_enabled()
            if self._grad:
                torch.set_grad_enabled(False)
            return
        with contextlib.ExitStack() as stack:
            if others:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.autocast("cpu", enabled=False))
            stack.enter_context(torch.no_grad())
            if threads != self._threads:
                stack.callback(torch.set_num_threads, threads)
                torch.set_num_threads(self._threads)
            if dtype is not torch.float32:
                stack.callback(torch.set_default_dtype, dtype)
                torch.set_default_dtype(torch.float32)
            self._before = stack.pop_all()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self._before.close()
        if self._grad:
            torch.set_grad_enabled(True)
