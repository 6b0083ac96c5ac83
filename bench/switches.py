"""The compiled path with one of its optimizations switched off: what each is worth.

A switch changes what a path is compiled from, or a constant that it looks at as it runs, and is off for as long as that
path compiles or answers; everything else stays as it is. Such a path is compiled anew, for what is kept in caches was
compiled with everything on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor

from ..compiled import attention, linear, path, programs
from ..spec.config import Storage
from ..spec.weights import WeightSource
from .candidates import Candidate, PathCandidate


@dataclass(frozen=True, kw_only=True)
class Switch:
    """An optimization."""

    name: str
    without: str
    """What is done in its place."""
    off: Callable[[], AbstractContextManager[Any]] = ExitStack
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `CompiledPath`."""


def _constants(*changes: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Modules' names with other values."""

    @contextmanager
    def off() -> Iterator[None]:
        with ExitStack() as stack:
            for module, name, value in changes:
                stack.enter_context(mock.patch.object(module, name, value))
            yield

    return off


def _kernels(*options: str) -> Callable[[], AbstractContextManager[Any]]:
    """Inductor's options of these names as Inductor has them."""
    own: dict[str, Any] = inductor.get_config_copy()
    return lambda: mock.patch.dict(programs.OPTIONS, {name: own[name] for name in options})


_ONEDNN = (
    Switch(
        name="oneDNN",
        without="products of many rows by F.linear, attention to a prompt by torch's fused one",
        off=_constants((linear, "_onednn", None), (attention, "_PRODUCT_ROWS", 2**62)),
    ),
    Switch(
        name="attention by products",
        without="attention to a prompt by torch's fused one",
        off=_constants((attention, "_PRODUCT_ROWS", 2**62)),
    ),
)

SWITCHES = (
    Switch(name="CPU graphs", without="each step calls the compiled pieces", options={"captured": False}),
    Switch(
        name="four rows a pass",
        without="each row reads the weights anew",
        off=_constants((linear, "PASS_ROWS", 1), (path, "PASS_ROWS", 1)),
    ),
    *(_ONEDNN if linear.multiplies_fast(torch.empty(0)) else ()),
    Switch(
        name="multiply-add as one",
        without="products are rounded before they are added",
        off=_kernels("cpp.enable_floating_point_contract_flag"),
    ),
    Switch(
        name="terms in registers",
        without="Inductor's own thresholds for what is written out to memory",
        off=_kernels("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"),
    ),
    Switch(
        name="short loops alone",
        without="Inductor's own threshold for what several threads share",
        off=_kernels("cpp.min_chunk_size"),
    ),
)


class SwitchedOff:
    """A candidate that answers with a switch off."""

    def __init__(self, source: WeightSource, storage: Storage, switch: Switch) -> None:
        self._switch = switch
        with switch.off(), inductor.patch(force_disable_caches=True):
            compiled = path.CompiledPath(source, storage=storage, **switch.options)
            compiled.compile()
        self._candidate: Candidate = PathCandidate(compiled)

    def answer(self, prompt_T: Tensor, new: int, batch: int = 1) -> Iterator[Sequence[int]]:
        with self._switch.off():
            yield from self._candidate.answer(prompt_T, new, batch)
