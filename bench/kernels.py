"""What a compiled program does by the kernels that Inductor made for it: the time spent in them, and their loops.

On a CPU, the code around the kernels loads each through `AsyncCompile.cpp_pybinding`, whether it has just been compiled
or was found in a cache; so that is where kernels are counted and timed. What a program spends outside of kernels is
what Python, and torch's operators that are no kernels of Inductor's, take.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CodeCacheFuture, PyCodeCache

from .hooks import replaced

_PARALLEL_LOOP = re.compile(r"#pragma omp for")


@dataclass(slots=True)
class Kernel:
    """One kernel as a program calls it."""

    loops: int
    """Parallel ones; with one thread there are none."""
    calls: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Kernels:
    """All kernels that were loaded while `watched`."""

    each: list[Kernel] = field(default_factory=list)

    def forget(self) -> None:
        """Count anew from here."""
        for kernel in self.each:
            kernel.calls, kernel.seconds = 0, 0.0

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.each)

    def loops_a_layer(self, steps: int, layers: int) -> float | None:
        """Parallel loops of a layer in so many steps of a model with so many layers, on average.

        Kernels called once a step stand before or after the layers; with a single layer they cannot be told apart.
        """
        if layers == 1:
            return None
        inside = sum(kernel.loops * kernel.calls for kernel in self.each if kernel.calls > steps)
        return inside / (steps * layers)


@contextmanager
def watched() -> Iterator[Kernels]:
    """Count and time the kernels of programs that are compiled, or found in a cache, meanwhile; also later calls."""
    kernels, load = Kernels(), AsyncCompile.cpp_pybinding

    def loading(compiler: AsyncCompile, argtypes: list[str], source_code: str) -> Callable[..., Any]:
        loaded: Any = load(compiler, argtypes, source_code)
        function = loaded.result() if isinstance(loaded, CodeCacheFuture) else loaded
        kernel = Kernel(loops=len(_PARALLEL_LOOP.findall(source_code)))
        kernels.each.append(kernel)

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            kernel.seconds += time.perf_counter() - start
            kernel.calls += 1
            return result

        return timed

    PyCodeCache.cache_clear()  # what has been loaded before would not be loaded again
    with replaced(AsyncCompile, "cpp_pybinding", loading):
        yield kernels
