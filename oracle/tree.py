"""Whatever a call takes or returns, as the tensors within: dataclasses, tuples, lists and dicts are walked in order."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..spec import config, mlp, moe
from ..spec.ambient import CPU
from .case import Inputs


def tensors(value: Any) -> list[Tensor]:
    """Every tensor within, in order, where it is."""
    return [leaf.detach() for leaf in _walk(value) if isinstance(leaf, Tensor)]


def _walk(value: Any) -> list[Any]:
    """Every leaf, in the order of `map_leaves`."""
    found: list[Any] = []
    _gather(value, found)
    return found


def _gather(value: Any, found: list[Any]) -> None:
    kind: type = type(value)
    if kind is Tensor:  # most leaves are
        found.append(value)
        return
    names = _field_names(kind)
    if names is not None:
        for name in names:
            _gather(getattr(value, name), found)
    elif issubclass(kind, tuple | list):
        for item in value:
            _gather(item, found)
    elif issubclass(kind, dict):
        for item in value.values():
            _gather(item, found)
    else:
        found.append(value)


_OF_CONFIGS = {module.__name__ for module in (config, mlp, moe)}


@cache
def _field_names(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass; None for any other type, and for a config, which holds no tensor and is one leaf."""
    if not is_dataclass(kind) or kind.__module__ in _OF_CONFIGS:
        return None
    return tuple(field.name for field in fields(kind) if field.init)


def memory(value: Any) -> set[int]:
    """The addresses of the storages of every tensor that holds anything."""
    return storages_of(tensors(value))


def storages_of(found: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel()}


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to everything that is not a dataclass, tuple, list or dict, rebuilding those around it."""
    kind: type = type(value)
    if kind is Tensor:  # most leaves are
        return function(value)
    names = _field_names(kind)
    if names is not None:
        return kind(**{name: map_leaves(function, getattr(value, name)) for name in names})
    if issubclass(kind, tuple | list):
        items = [map_leaves(function, item) for item in value]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)  # a named tuple takes one by one
    if issubclass(kind, dict):
        return {key: map_leaves(function, item) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> list[Tensor]:
    """Every tensor within, in order, in CPU memory; an integer counts as a tensor of no axes."""
    return [
        leaf.detach().cpu() if isinstance(leaf, Tensor) else torch.tensor(leaf, device="cpu")
        for leaf in _walk(value)
        if isinstance(leaf, Tensor) or (isinstance(leaf, int) and not isinstance(leaf, bool))
    ]


def device_of(inputs: Inputs) -> torch.device:
    """The device of the first tensor, or the CPU."""
    return next((tensor.device for tensor in tensors(inputs)), CPU)


def copied(inputs: Inputs) -> Inputs:
    """The same inputs in memory of their own."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, torch.Generator):
            return leaf.clone_state()
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return {name: map_leaves(copy, value) for name, value in inputs.items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: NaN equals itself, and 0.0 is not -0.0.

    >>> same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    True
    >>> same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    False
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_as_bits(a), _as_bits(b))


def _as_bits(value: Tensor) -> Tensor:
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(words[value.element_size()])
