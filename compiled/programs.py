"""Pieces of programs as compiled graphs: compiled once with every size dynamic, then called without torch's guards.

Why it is faster: checking the properties of all of a layer's weights at each call costs much of what a small layer
costs. The checks can go because `path` alone makes the arguments: weights never change, sizes that change are marked
dynamic (the marking fails if the graph were special to one), and everything else that torch would check is pinned by
`spec.ambient.pinned`. Tests compile with the guards kept, and run every shape under `fail_on_recompile`.
"""

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .artifacts import KERNELS, load_or_compile
from .cache_folder import use_private_cache
from .cpu_graph import kernels_noticed

P = ParamSpec("P")
R = TypeVar("R")


DynamicDims = Mapping[str, Sequence[int]]
"""The dimensions of a piece's arguments that change from call to call, by the arguments' names.

For a tuple, those of all its tensors.
"""


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

ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether torch keeps the graphs of one code apart, as 2.11 does not: there pieces keep their guards, and none is kept
on disk."""

_numbers = itertools.count()


def graph(
    function: Callable[..., Any], *, keep_guards: bool = False, kernels: Mapping[str, Any] = KERNELS
) -> Callable[..., Any]:
    """Return the function under torch.compile; nothing is compiled before its first call.

    `kernels` are options of Inductor that differ from this path's own.
    """
    use_private_cache(warnings.warn)
    options = {**OPTIONS, **kernels}
    if not keep_guards and ISOLATES:
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    # Pieces of other paths share this one's code: without guards, only isolation keeps their graphs apart. And with
    # dynamic=None a float that another path's config has otherwise would be traced as a variable.
    if ISOLATES:
        options_of_compile: dict[str, Any] = {"isolate_recompiles": True}
    else:
        function, options_of_compile = _namesake(function), {}
    compiled: Callable[..., Any] = _compile(
        function, fullgraph=True, dynamic=False, options=options, **options_of_compile
    )
    return compiled


def _namesake(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with a code object of its own, since torch keeps what it compiles by code."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    made = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


class Pieces:
    """Makes the pieces of one program; each is compiled, or found in the cache, when it first meets arguments.

    `described` says what the arguments do not: which program, and config and storage. `on_compile` is called with a
    few words that say why a piece has to be compiled.
    """

    def __init__(
        self,
        described: str,
        on_compile: Callable[[str], None],
        *,
        keep_guards: bool = False,
        kernels: Mapping[str, Any] = KERNELS,
    ) -> None:
        self._described = described
        self._on_compile = on_compile
        self._keep_guards = keep_guards
        self._kernels = kernels
        self._made = 0

    def __call__(self, function: Callable[P, R], dynamic: DynamicDims) -> Callable[P, R]:
        program = graph(function, keep_guards=self._keep_guards, kernels=self._kernels)
        # Whether a kept program keeps guards is not known, and it is loaded for this path's own kernels.
        kept = ISOLATES and not self._keep_guards and {**OPTIONS, **self._kernels} == OPTIONS
        described = f"{self._described} {self._made} {function.__name__}"
        self._made += 1
        compiled: Callable[..., Any] | None = None

        def piece(*arguments: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                mark_dynamic(function, arguments, dynamic)
                with kernels_noticed():
                    compiled = load_or_compile(program, arguments, described, self._on_compile) if kept else program
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
