"""Pieces of programs as compiled graphs: compiled once with every size dynamic, then called without torch's guards.

Why it is faster: checking the properties of all of a layer's weights at each call costs much of what a small layer
costs. The checks can go because `path` alone makes the arguments: weights never change, sizes that change are marked
dynamic (the marking fails if the graph were special to one), and everything else that torch would check is pinned by
`spec.ambient.pinned`. Tests compile with the guards kept, and run every shape under `fail_on_recompile`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .artifacts import KERNELS, ready
from .cache_folder import use_private_cache
from .cpu_graph import kernels_noticed
from .steps import Varying

OPTIONS: dict[str, Any] = {
    "size_asserts": False,
    "alignment_asserts": False,
    "assert_indirect_indexing": False,
    **KERNELS,
}
"""For these graphs, not set globally; the first three are checks at run time of what the path has checked already."""

CAPTURING: dict[str, Any] = {"triton.cudagraphs": True}
"""What `torch.compile(mode="reduce-overhead")` stands for; a mode cannot be given beside options."""

_compile: Callable[..., Any] = torch.compile  # its type stub does not know isolate_recompiles


def graph(function: Callable[..., Any], *, keep_guards: bool = False, capturing: bool = False) -> Callable[..., Any]:
    """The function under torch.compile; nothing is compiled before its first call. `capturing`: with CUDA graphs."""
    use_private_cache(warnings.warn)
    options = OPTIONS | CAPTURING if capturing else dict(OPTIONS)
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

    `described` says what the arguments do not: which program, and config and storage. `compiling` is told, in a few
    words, why a piece has to be compiled.
    """

    def __init__(
        self, described: str, compiling: Callable[[str], None], *, keep_guards: bool = False, capturing: bool = False
    ) -> None:
        self._described = described
        self._compiling = compiling
        self._keep_guards = keep_guards
        self._capturing = capturing
        self._made = 0

    def __call__(self, function: Callable[..., Any], varying: Varying) -> Callable[..., Any]:
        program = graph(function, keep_guards=self._keep_guards, capturing=self._capturing)
        described = f"{self._described} {self._made} {function.__name__}"
        self._made += 1
        compiled: Callable[..., Any] | None = None

        def piece(*arguments: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                _mark(arguments, varying)
                with kernels_noticed():
                    if self._keep_guards or self._capturing:  # whether a kept program keeps them is not known
                        compiled = program
                    else:
                        compiled = ready(program, arguments, described, self._compiling)
                    return compiled(*arguments)
            return compiled(*arguments)

        return piece


def _mark(arguments: tuple[Any, ...], varying: Varying) -> None:
    for axis, numbers in enumerate(varying):
        for each in pytree.tree_leaves([arguments[number] for number in numbers]):
            if isinstance(each, Tensor):
                torch._dynamo.mark_dynamic(each, axis)


def dynamic(*tensors: Tensor) -> None:
    """Say that the first dimension of these varies from call to call."""
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
