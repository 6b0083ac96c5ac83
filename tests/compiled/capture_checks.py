"""Whether a CUDA graph could capture a program, found out without a GPU.

A captured graph replays kernels on fixed addresses: the program may not read a tensor's value on the host, shape
anything by one, move tensors between devices, or make tensors on a device that it does not name. Two checks:
`value_read` runs the program where there are no values; `violations` walks what torch traces of it. (`fullgraph=True`
is not enough: `.item()`, `nonzero` and masks as indices all trace.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

_SYMBOLIC = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__"}
_MOVES = {"cpu", "cuda", "to", "pin_memory"}
_FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "scalar_tensor",
    "zeros",
}
_LITERALS = {"tensor", "as_tensor", "from_numpy", "asarray"}


def value_read(program: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """What the program reads of its tensors' values, or None: run on tensors that have none (device "meta")."""
    without_values = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments)
    try:
        program(*without_values)
    except (RuntimeError, NotImplementedError) as error:  # what torch raises depends on the operator
        return f"reads a value: {str(error).strip().splitlines()[0]}"
    return None


def violations(program: Callable[..., Any], arguments: tuple[Any, ...]) -> list[str]:
    """What forbids capture in the program as torch traces it, one line each; empty where nothing does."""
    graphs: list[fx.GraphModule] = []

    def record(graph: fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compile_apart: Callable[..., Callable[..., Any]] = torch.compile  # its type stub does not know isolate_recompiles
    # dynamic=False: a float that an earlier trace of the same code had otherwise would be made a variable, and read.
    traced = compile_apart(program, backend=record, fullgraph=True, dynamic=False, isolate_recompiles=True)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        try:
            traced(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # a branch on a value, for one
            return [f"cannot be traced: {str(error).strip().splitlines()[0]}"]
    nodes = [
        node
        for graph in graphs
        for part in graph.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    ]
    return [complaint for node in nodes for complaint in _complaints(node)]


def _complaints(node: fx.Node) -> list[str]:
    """Unbacked symbols are sizes or numbers that come from a tensor's value."""
    found = []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    called = node.op in ("call_function", "call_method")
    if called and name in _READS:
        found.append(f"{node.name}: {name} reads a value")
    if called and pytree.tree_any(_is_unbacked, node.meta.get("example_value")):
        found.append(f"{node.name}: {name} makes a size or number from a value")
    if called and name in _MOVES and _names_device(node, name):
        found.append(f"{node.name}: {name} moves a tensor to a named device")
    if called and name in _LITERALS:
        found.append(f"{node.name}: {name} brings data from the host")
    if node.op == "call_function" and name in _FACTORIES and node.kwargs.get("device") is None:
        found.append(f"{node.name}: {name} without device= lands on the default device")
    return found


def _is_unbacked(value: object) -> bool:
    return isinstance(value, _SYMBOLIC) and bool(free_unbacked_symbols(value))


def _names_device(node: fx.Node, name: str) -> bool:
    if name != "to":
        return True
    values = [*node.args[1:], *node.kwargs.values()]
    return any(isinstance(value, torch.device | str) for value in values)
