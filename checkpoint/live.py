"""A live `transformers` model as a `WeightSource`, read through the same declarations as files.

Nothing of transformers is imported: a module is asked for its config, as JSON, and for its tensors. These are handed on
as they are, views where several weights stand in one tensor, so the source and the module share storage: weights that
the module changes later change here too, wherever a path has not copied them. What a file keeps in another order
(queries, keys and values by group) or once for all heads is copied, one layer at a time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..spec.errors import RequestError
from .families import FAMILIES
from .family import weights_of
from .fields import Fields, parsed_json
from .source import FileSource


def from_transformers(module: Any, *, context: int | None = None) -> FileSource:
    """The weights of a model of one of the families, with or without its head.

    `context` limits how many tokens a sequence may hold. Raises `RequestError` for what is no transformers model, and
    `CheckpointError`, `ConfigError` or `WeightError`, as a folder would, for one that is not parsed.
    """
    write_config = getattr(getattr(module, "config", None), "to_json_string", None)
    if not isinstance(module, torch.nn.Module) or write_config is None:
        raise RequestError(
            f"module is a {type(module).__name__}; it must be a transformers model, a torch module with a config"
        )
    where = f"{type(module).__name__}.config"
    values = parsed_json(write_config(), where, "correct it")
    values["architectures"] = [type(module).__name__]  # the class that it is, not the one that its file was saved by
    return weights_of(FAMILIES, Fields(values, f"{where}: ", most_tokens=context), LiveModule(module))


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class LiveModule:
    """A `TensorStore` over a module's own tensors."""

    def __init__(self, module: torch.nn.Module):
        self.where = f"this {type(module).__name__}"
        self._tensors: dict[str, Any] = dict(module.state_dict())
        self.shapes: Mapping[str, tuple[int, ...]] = {name: _shape(each) for name, each in self._tensors.items()}

    def tensor_table(self) -> bytes:
        dtypes = {name: getattr(tensor, "dtype", None) for name, tensor in self._tensors.items()}
        return repr([(name, dtypes[name], shape) for name, shape in self.shapes.items()]).encode()

    def unreadable(self, name: str) -> str | None:
        tensor = self._tensors[name]
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"kept as a {type(tensor).__name__}; only plain tensors can be read"
        if tensor.is_meta:
            return "on the meta device, where tensors have no values"
        if tensor.layout is not torch.strided:
            return f"kept as {tensor.layout}; only strided tensors can be read"
        return (
            None
            if tensor.dtype in FLOATS
            else f"kept as {tensor.dtype}; only {', '.join(map(str, FLOATS))} can be read"
        )

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name].detach().to("cpu")
        return tensor

    def read_slice(self, name: str, cuts: tuple[slice, ...]) -> Tensor:
        tensor: Tensor = self._tensors[name].detach()[cuts].to("cpu")
        return tensor


def _shape(value: Any) -> tuple[int, ...]:
    """A tensor's; () for what modules keep beside tensors, and for parameters that have not been given a shape yet."""
    known = isinstance(value, Tensor) and not torch.nn.parameter.is_lazy(value)
    return tuple(value.shape) if known else ()
