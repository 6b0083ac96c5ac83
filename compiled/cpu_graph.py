"""Decode steps on a CPU as CPU graphs: the kernels of one step with their arguments, called again on the same memory.

Why it is faster: around each of its kernels a compiled program's Python looks up weights, allocates what the kernel
writes and takes the results apart, which for a small model takes a quarter of a step; a replay is one call a kernel,
and little more than a layer is one kernel. It is to a CPU what a CUDA graph is to a GPU, and `graph.DecodeGraphs` uses
either by the same rules.

A function that must run anew at each replay, whatever it does, is recorded as one call (`call_whole`).

What it relies on: Inductor's kernels are functions in the modules that it writes, named `cpp_fused...` and called with
tensors and sizes alone; all else that computes goes through torch's dispatcher. `path` compares a replay with the plain
call before it trusts CPU graphs of a program, and does without them where the two differ; a later graph must have as
many calls, or its step is done without.

A tape keeps alive what was allocated while it was recorded, and no caches: it is recorded on tensors that only point
to them (`borrowed`). When they are gone it can be moved to others of the same form.
"""

import bisect
import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .turn import PROCESS

_KERNEL = "cpp_fused"

_LEAST_STEP = 64
"""A graph is for a multiple of so many slots, or of an eighth to a quarter of long sequences: recording anew costs two
steps, reading some slots in vain very little of each."""

_recording = threading.local()
"""Has the tape that this thread records, while it does."""

_loaded: list[dict[str, Any]] = []
"""The names within every module that Inductor loaded for our pieces. As `sys.modules` does, it keeps them."""


@contextmanager
def kernels_noticed() -> Iterator[None]:
    """Remember modules that are loaded meanwhile: Inductor forgets its own when anyone compiles with fresh caches."""
    with PROCESS:
        original, load = vars(PyCodeCache)["load_by_key_path"], PyCodeCache.load_by_key_path

        def loading(*arguments: Any, **options: Any) -> Any:
            module = load(*arguments, **options)
            if not [names for names in _loaded if names is vars(module)]:
                _loaded.append(vars(module))
            return module

        try:
            PyCodeCache.load_by_key_path = staticmethod(loading)  # type: ignore[method-assign]
            yield
        finally:
            PyCodeCache.load_by_key_path = original  # type: ignore[method-assign]


class CpuGraph:
    """`graph.Captured`: calls in the order in which they were made."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.within_operator = False
        self._places: list[_Place] | None = None

    def replay(self) -> None:
        for function, arguments in self.calls:
            function(*arguments)

    def reset(self) -> None:
        self.calls.clear()

    def move(self, old: Sequence[tuple[int, int]], new: Sequence[Tensor]) -> bool:
        """Work on `new` from now on, in place of tensors of the same forms that lay at `old`, addresses and bytes.

        False, and nothing has changed, where an operator was given one of them: only kernels can be given another.
        """
        if self._places is None:
            self._places = _places(self.calls, old)
        if any(self.calls[each.call][0] in (_again, _again_into, _whole) for each in self._places):
            return False
        for call, places in itertools.groupby(self._places, lambda each: each.call):
            function, given = self.calls[call]
            arguments = list(given)
            for each in places:
                size, stride, offset = each.form
                arguments[each.argument] = new[each.number].as_strided(
                    size, stride, new[each.number].storage_offset() + offset
                )
            self.calls[call] = function, tuple(arguments)
        return True


class _Place(NamedTuple):
    """An argument of a call that lies in the memory of one of some tensors."""

    call: int
    argument: int
    number: int
    """Of the tensor."""
    form: tuple[Sequence[int], Sequence[int], int]
    """Size, stride and offset within it."""


def _places(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], spans: Sequence[tuple[int, int]]
) -> list[_Place]:
    order = sorted(range(len(spans)), key=spans.__getitem__)
    starts = [spans[number][0] for number in order]
    found = []
    for call, (_, arguments) in enumerate(calls):
        for argument, given in enumerate(arguments):
            for each in _tensors(given):
                address = each.data_ptr()
                at = bisect.bisect_right(starts, address) - 1
                offset = address - starts[at]
                if at >= 0 and offset < spans[order[at]][1]:
                    form = each.size(), each.stride(), offset // each.element_size()
                    found.append(_Place(call, argument, order[at], form))
    return found


class CpuGraphs:
    """`graph.Device` by CPU graphs."""

    def pool(self) -> None:
        return None  # a tape's memory is its own: small beside the weights

    def slots(self, longest: int, capacity: int) -> int:
        """How many slots a tape reads for sequences of at most `longest` tokens, the new one included.

        >>> [CpuGraphs().slots(longest, capacity=1300) for longest in (1, 64, 65, 1100, 1290)]
        [64, 64, 128, 1280, 1300]
        """
        step = max(_LEAST_STEP, (1 << longest.bit_length()) // 8)
        return min(-(-longest // step) * step, capacity)

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, all of it and in its order, which the result does not keep alive."""
        assert tensor.is_contiguous(), tensor.stride()
        pointed_to = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        return torch.frombuffer(pointed_to, dtype=tensor.dtype).view(tensor.shape)

    def move(self, captured: CpuGraph, old: Sequence[tuple[int, int]], new: Sequence[Tensor]) -> bool:
        return captured.move(old, new)

    def length(self, captured: CpuGraph) -> int:
        return len(captured.calls)

    def write(self, step_3R: Tensor, step: Sequence[Sequence[int]]) -> None:
        """Without torch: an operator on the way takes longer than a kernel of a small model."""
        numbers = (ctypes.c_int64 * step_3R.numel()).from_address(step_3R.data_ptr())
        numbers[:] = [*itertools.chain.from_iterable(step)]

    def capture(self, call: Callable[[], Tensor], pool: None) -> tuple[CpuGraph, Tensor]:
        """Run the call and record it."""
        tape = CpuGraph()
        with PROCESS, _kernels_recorded(tape), _Operators(tape):
            _recording.tape = tape
            try:
                result = call()
            finally:
                _recording.tape = None
        return tape, result


def call_whole(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function; a recording has it as one call, made anew at each replay, and nothing of what it does.

    Tensors that it returns are copied into the memory of the first ones; or it returns an argument, or nothing.
    """
    tape: CpuGraph | None = getattr(_recording, "tape", None)
    if tape is None:
        return function(*arguments)
    _recording.tape, tape.within_operator = None, True
    try:
        with _disable_current_modes():
            result = function(*arguments)
    finally:
        _recording.tape, tape.within_operator = tape, False
    given = {each.untyped_storage().data_ptr() for each in _tensors(arguments)}
    made = _tensors(result)
    if all(each.untyped_storage().data_ptr() in given for each in made):
        made = []
    tape.calls.append((_whole, (function, arguments, made)))
    return result


@contextmanager
def _kernels_recorded(tape: CpuGraph) -> Iterator[None]:
    """Put in each kernel's place, in its module, what calls and records it; for calls of this thread."""
    thread = threading.get_ident()

    def recorder(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            if threading.get_ident() == thread and not tape.within_operator:
                tape.calls.append((kernel, arguments))
            return kernel(*arguments)

        return recorded

    kernels = [(names, name, names[name]) for names in _loaded for name in names if name.startswith(_KERNEL)]
    try:
        for names, name, kernel in kernels:
            names[name] = recorder(kernel)
        yield
    finally:
        for names, name, kernel in kernels:
            names[name] = kernel


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what a call computes outside of kernels."""

    def __init__(self, tape: CpuGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled program still runs compiled."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._tape.within_operator = True  # kernels that it calls are called again with it
        try:
            result = func(*args, **kwargs)
        finally:
            self._tape.within_operator = False
        made = _tensors(result)
        given = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        if func._schema.is_mutable:
            self._tape.calls.append((_again, (func, args, kwargs)))
        elif any(each.untyped_storage().data_ptr() not in given for each in made):  # not a view
            self._tape.calls.append((_again_into, (func, args, kwargs, made)))
        return result


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    func(*args, **kwargs)


def _whole(function: Callable[..., Any], arguments: tuple[Any, ...], made: list[Tensor]) -> None:
    result = function(*arguments)
    if made:
        for target, each in zip(made, _tensors(result), strict=True):
            target.copy_(each)


def _again_into(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> None:
    for target, each in zip(made, _tensors(func(*args, **kwargs)), strict=True):
        target.copy_(each)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = [tree] if isinstance(tree, Tensor | int) else pytree.tree_leaves(tree)  # what kernels are given is no tree
    return [each for each in leaves if isinstance(each, Tensor)]
