"""The compiled path with one of its optimizations switched off by an option: what each is worth."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch._inductor import config as inductor

from ..compiled.path import CompiledPath
from ..spec.config import Storage
from ..spec.weights import WeightSource
from .candidates import PathCandidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """An optimization."""

    name: str
    without: str
    """The plainer way that takes its place."""
    options: Mapping[str, Any]
    """Those of `CompiledPath` that switch it off."""


def _kernels(*names: str) -> dict[str, Any]:
    """Return the option that gives Inductor's options of these names the values that Inductor has for them."""
    own: dict[str, Any] = inductor.get_config_copy()
    return {"kernels": {name: own[name] for name in names}}


SWITCHES = (
    Switch(name="CPU graphs", without="each step calls the compiled pieces", options={"captured": False}),
    Switch(
        name="multiply-add as one",
        without="products are rounded before they are added",
        options=_kernels("cpp.enable_floating_point_contract_flag"),
    ),
    Switch(
        name="terms in registers",
        without="Inductor's own thresholds for what is written out to memory",
        options=_kernels("realize_opcount_threshold", "realize_reads_threshold", "realize_acc_reads_threshold"),
    ),
    Switch(
        name="short loops on one thread",
        without="Inductor's own threshold for what several threads share",
        options=_kernels("cpp.min_chunk_size"),
    ),
)


def switched_off(source: WeightSource, storage: Storage, switch: Switch) -> PathCandidate:
    """Return a path without this optimization, compiled."""
    path = CompiledPath(source, storage=storage, **switch.options)
    path.compile()
    return PathCandidate(path)
