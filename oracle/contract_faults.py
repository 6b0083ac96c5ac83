"""Faults that any op may have though its numbers are right: in shape, dtype, and whose memory is read and written."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .case import Inputs
from .op import Function, Op
from .trial import leaves, map_leaves, tensors


def contract_faults(op: Op) -> Iterator[tuple[str, Callable[[], Function]]]:
    """Yield each by name: the numbers are right, and the contract is broken."""
    yield "writes_to_its_input", lambda: _writing(op)
    yield "one_axis_more", lambda: lambda **given: _changed_tensors(op, given, lambda out: out[None])
    yield (
        "another_dtype",
        lambda: lambda **given: _changed_tensors(op, given, lambda out: out.double()),
    )
    if any(op.outputs):  # an integer has no memory
        yield "result_in_its_inputs_memory", lambda: _aliasing(op)
        yield "result_kept_and_given_again", lambda: _given_again(op)


def _changed_tensors(op: Op, given: Inputs, change: Callable[[Tensor], Tensor]) -> Any:
    out = op.reference(**given)
    return (
        map_leaves(lambda leaf: change(leaf if isinstance(leaf, Tensor) else torch.tensor(leaf)), out)
        if _tensors_only(out)
        else change(torch.tensor(out))
    )


def _tensors_only(out: Any) -> bool:
    return not isinstance(out, int)


def _writing(op: Op) -> Function:
    """As a kernel that pads or rounds in place."""

    def call(**given: Any) -> Any:
        out = op.reference(**given)
        for leaf in leaves({name: value for name, value in given.items() if isinstance(value, Tensor)} or given):
            if leaf.numel() and leaf.ndim:
                leaf.view(-1)[-1:].copy_(leaf.reshape(-1)[:1]) if leaf.is_contiguous() else leaf.zero_()
        return out

    return call


def _aliasing(op: Op) -> Function:
    """The result is written where the first input of its shape and dtype was, whose values are put back later."""

    def call(**given: Any) -> Any:
        out = op.reference(**given)
        first = leaves(out)[0]
        for value in leaves(given):
            if (
                value.numel()
                and value.untyped_storage().nbytes() >= first.numel() * first.element_size()
                and first.ndim
            ):
                view = torch.empty(0, dtype=first.dtype).set_(value.untyped_storage(), 0, first.shape, first.stride())
                view.copy_(first)
                return replace_first(out, view)
        return out  # no input is large enough

    return call


def _given_again(op: Op) -> Function:
    """The same memory for the same values, as a view of a table."""
    results: dict[Any, Any] = {}

    def call(**given: Any) -> Any:
        values = tuple(leaf.contiguous().view(torch.uint8).numpy().tobytes() for leaf in tensors(given) if leaf.ndim)
        key = values, str([value for value in given.values() if not tensors(value)])
        return results.setdefault(key, op.reference(**given))

    return call


def replace_first(out: Any, view: Tensor) -> Any:
    """The result with another first tensor."""
    done = False

    def put(leaf: Any) -> Any:
        nonlocal done
        if isinstance(leaf, Tensor) and not done:
            done = True
            return view
        return leaf

    return map_leaves(put, out)
