"""Faults that any op may have, made from its reference: the guarantee must catch each with the default number of cases.

Those that know the formula stand beside each op's record (`Op.mutants`); these know only tensors and calls.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .case import Case, Inputs, RandomPicker
from .contract_faults import contract_faults
from .guarantees import Statistical
from .op import PROPERTIES_EVERY, Function, Op
from .process import ProcessState
from .trial import copied, leaves, map_leaves, tensors


class Family(StrEnum):
    LOGIC = "logic"
    """The formula is wrong: `Op.mutants`."""
    SIZE = "size"
    """Right on small sizes."""
    ARGUMENT = "argument"
    """An argument is ignored."""
    DTYPE = "dtype"
    """Right in float32, or in all but one dtype."""
    DATA = "data"
    """Right on numbers of ordinary size, in ordinary memory."""
    STATE = "state"
    """Right when called once, or until others are called."""
    CONTRACT = "contract"
    """The numbers are right."""
    SAMPLING = "sampling"
    """Draws that are nearly right: `Op.mutants` of `draw`."""


@dataclass(frozen=True)
class Mutant:
    op: str
    name: str
    family: Family
    make: Callable[[], Function]
    """A fresh one: some remember."""


NO_FAULTS = {("sbi_gemm", "blocks_ignored"), ("route", "subnormals_become_zero")}
"""Changes that nobody can see or mind: how a product is divided shows in no result, and exponentials that small may be
zero."""


def mutants(op: Op) -> list[Mutant]:
    """Every fault of an op, its own included."""
    own = Family.SAMPLING if isinstance(op.guarantee, Statistical) else Family.LOGIC
    found = [Mutant(op.name, name, own, lambda wrong=wrong: wrong) for name, wrong in op.mutants.items()]  # type: ignore[misc]
    cases = [op.draw(RandomPicker(seed)) for seed in range(60)]
    for family, name, make in _generic(op, cases):
        if (op.name, name) not in NO_FAULTS:
            found.append(Mutant(op.name, name, family, make))
    return found


def caught_after(mutant: Mutant, op: Op, cases: int, draw: Callable[[int], Case]) -> int | None:
    """The number of cases until the op's guarantee or a property fails the mutant, as in a check; None if none does."""
    function = mutant.make()
    before = ProcessState.now()
    evidence = []
    try:
        for number in range(cases):
            try:
                verdict = op.guarantee.judge(op.trial(function, draw(number)))
            except Exception:  # the fault's own, where what it pins does not fit; it shows nothing of the guarantee
                continue
            if verdict.failed or (number % PROPERTIES_EVERY == 0 and _breaks_a_law(op, function, draw(number))):
                return number + 1
            if verdict.evidence is not None:
                evidence.append(verdict.evidence)
    finally:
        before.restore()
    if isinstance(op.guarantee, Statistical) and op.guarantee.pooled(evidence).failed:
        return cases
    return None


def _breaks_a_law(op: Op, function: Function, case: Case) -> bool:
    for law in op.properties:
        try:
            law(op, function, case)
        except AssertionError:
            return True
        except Exception:  # the fault's own
            continue
    return False


Made = tuple[Family, str, Callable[[], Function]]


def _generic(op: Op, cases: list[Case]) -> Iterator[Made]:
    inputs = [op.inputs(case) for case in cases]
    if isinstance(op.guarantee, Statistical):
        yield from _arguments(op, inputs)
        return
    yield from _sizes(op, inputs)
    yield from _arguments(op, inputs)
    outs = [out for given in inputs for out in leaves(op.reference(**copied(given))) if out.is_floating_point()]
    if outs:
        yield from _dtypes(op, outs)
        yield from _data(op, inputs, outs)
    yield from _states(op, inputs)
    yield from ((Family.CONTRACT, name, make) for name, make in contract_faults(op))


def _changed(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor changed, and every number through a tensor."""

    def leaf_changed(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        return int(change(torch.tensor([leaf]))[0]) if type(leaf) is int else leaf

    return map_leaves(leaf_changed, out)


def _last_off(out: Tensor) -> Tensor:
    """The last element 1 more, and its sign turned."""
    if not out.numel():
        return out
    out = out.clone()
    last = tuple(size - 1 for size in out.shape)
    out[last] = ~out[last] if out.dtype is torch.bool else -1 - out[last]
    return out


def _sizes(op: Op, inputs: list[Inputs]) -> Iterator[Made]:
    largest = max(_largest(given) for given in inputs)
    for border in (16, 64, 128, 256):
        if largest > border:
            yield Family.SIZE, f"wrong_past_{border}", lambda border=border: _where(op, lambda n: n > border)  # type: ignore[misc]
    if largest > 64:
        yield Family.SIZE, "tail_of_64_wrong", lambda: _where(op, lambda n: n > 64 and n % 64 != 0)


def _where(op: Op, holds: Callable[[int], bool]) -> Function:
    def call(**given: Any) -> Any:
        out = op.reference(**given)
        return _changed(out, _last_off) if holds(_largest(given)) else out

    return call


def _largest(given: Inputs) -> int:
    """The largest size of any axis of any tensor."""
    return max((max(leaf.shape, default=0) for leaf in leaves(given)), default=0)


def _arguments(op: Op, inputs: list[Inputs]) -> Iterator[Made]:
    """Numbers, conventions and optional tensors that stay what the first case has."""
    for name in inputs[0]:
        values = [given[name] for given in inputs]
        if all(isinstance(value, bool | int | float | str | Enum | torch.dtype | None) for value in values):
            pinned = {value for value in values if value is not None}
            if len({*pinned, *([None] if None in values else [])}) > 1:
                value = next(value for value in values if value is not None)
                yield Family.ARGUMENT, f"{name}_ignored", lambda name=name, value=value: _pinned(op, name, value)  # type: ignore[misc]
        elif any(value is None for value in values):
            yield Family.ARGUMENT, f"{name}_ignored", lambda name=name: _pinned(op, name, None)  # type: ignore[misc]
        elif isinstance(values[0], Tensor) and values[0].dtype is torch.int64 and values[0].ndim == 1:
            yield Family.ARGUMENT, f"{name}_taken_for_a_range", lambda name=name: _as_range(op, name)  # type: ignore[misc]
        elif isinstance(values[0], Tensor) and values[0].dtype is torch.bool:
            yield Family.ARGUMENT, f"{name}_ignored", lambda name=name: _all_true(op, name)  # type: ignore[misc]


def _pinned(op: Op, name: str, value: Any) -> Function:
    return lambda **given: op.reference(**{**given, name: value})


def _as_range(op: Op, name: str) -> Function:
    """Counted on from the first element."""

    def call(**given: Any) -> Any:
        value: Tensor = given[name]
        first = int(value[0]) if len(value) else 0
        return op.reference(**{**given, name: torch.arange(first, first + len(value))})

    return call


def _all_true(op: Op, name: str) -> Function:
    return lambda **given: op.reference(**{**given, name: torch.ones_like(given[name])})


def _dtypes(op: Op, outs: list[Tensor]) -> Iterator[Made]:
    drawn = {out.dtype for out in outs}
    for dtype, factor in ((torch.bfloat16, 1.03), (torch.float16, 1.005), (torch.float32, 1.0001)):
        if dtype in drawn:
            name = str(dtype).removeprefix("torch.")
            yield Family.DTYPE, f"wrong_in_{name}", lambda dtype=dtype, factor=factor: _in_dtype(op, dtype, factor)  # type: ignore[misc]
    if torch.float32 in drawn:
        yield Family.DTYPE, "result_through_bfloat16", lambda: _through(op, torch.bfloat16)
        yield Family.DTYPE, "result_through_float16", lambda: _through(op, torch.float16)


def _in_dtype(op: Op, dtype: torch.dtype, factor: float) -> Function:
    def call(**given: Any) -> Any:
        return _changed(
            op.reference(**given), lambda out: (out.double() * factor).to(dtype) if out.dtype is dtype else out
        )

    return call


def _through(op: Op, dtype: torch.dtype) -> Function:
    def call(**given: Any) -> Any:
        return _changed(
            op.reference(**given), lambda out: out.to(dtype).to(out.dtype) if out.is_floating_point() else out
        )

    return call


def _data(op: Op, inputs: list[Inputs], outs: list[Tensor]) -> Iterator[Made]:
    if any(bool((out.double().abs() > 200).any()) for out in outs):
        yield Family.DATA, "result_capped_at_100", lambda: _on_floats(op, lambda out: out.clamp(-100, 100))
    if any(bool((_without_subnormals(out) != out).any()) for out in outs):
        yield Family.DATA, "subnormals_become_zero", lambda: _on_floats(op, _without_subnormals)
    if any(isinstance(value, Tensor) and value.ndim and value.numel() > 1 for value in inputs[0].values()):
        yield Family.DATA, "strides_ignored", lambda: _read_as_contiguous(op)
        yield Family.DATA, "offset_ignored", lambda: _read_from_the_start(op)


def _without_subnormals(out: Tensor) -> Tensor:
    """All but bfloat16's, which may become zero."""
    least = 0.0 if out.dtype is torch.bfloat16 else torch.finfo(out.dtype).smallest_normal
    return out.where(out.abs() >= least, 0.0)


def _on_floats(op: Op, change: Callable[[Tensor], Tensor]) -> Function:
    return lambda **given: _changed(op.reference(**given), lambda out: change(out) if out.is_floating_point() else out)


def _read_as_contiguous(op: Op) -> Function:
    """Memory read in order, whatever the strides say."""

    def in_order(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_contiguous():
            return value
        return value.as_strided(value.shape, torch.empty(value.shape).stride())

    return lambda **given: op.reference(**{name: in_order(value) for name, value in given.items()})


def _read_from_the_start(op: Op) -> Function:
    """A tensor's storage read from its first element on."""

    def from_start(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.storage_offset():
            return value
        return value.as_strided(value.shape, value.stride(), 0)

    return lambda **given: op.reference(**{name: from_start(value) for name, value in given.items()})


def _states(op: Op, inputs: list[Inputs]) -> Iterator[Made]:
    if leaves(op.reference(**inputs[0]))[0].ndim:
        yield Family.STATE, "buffer_used_again", lambda: _buffered(op)
    yield Family.STATE, "remembered_by_address", lambda: _remembered(op, lambda leaf: leaf.data_ptr())
    yield Family.STATE, "remembered_by_shape", lambda: _remembered(op, lambda leaf: leaf.shape)
    yield Family.STATE, "first_of_a_shape_wrong", lambda: _first_wrong(op)
    yield Family.STATE, "every_second_call_wrong", lambda: _second_wrong(op)
    yield Family.STATE, "seeds_random_numbers", lambda: _changing(op, lambda: torch.manual_seed(0))
    yield Family.STATE, "turns_mkldnn_off", lambda: _changing(op, lambda: torch._C._set_mkldnn_enabled(False))
    yield Family.STATE, "flushes_subnormals", lambda: _changing(op, lambda: torch.set_flush_denormal(True))
    yield Family.STATE, "sets_default_dtype", lambda: _changing(op, lambda: torch.set_default_dtype(torch.float64))
    yield Family.STATE, "leaves_grad_mode", lambda: _changing(op, lambda: torch.set_grad_enabled(False))


def _buffered(op: Op) -> Function:
    """One buffer for each shape and place in the result."""
    buffers: dict[Any, Tensor] = {}

    def call(**given: Any) -> Any:
        place = 0

        def keep(out: Tensor) -> Tensor:
            nonlocal place
            place += 1
            key = place, out.shape, out.dtype
            return buffers.setdefault(key, torch.empty_like(out)).copy_(out)

        return map_leaves(lambda leaf: keep(leaf) if isinstance(leaf, Tensor) else leaf, op.reference(**given))

    return call


def _remembered(op: Op, key: Callable[[Tensor], Any]) -> Function:
    results: dict[Any, Any] = {}

    def call(**given: Any) -> Any:
        place = (
            tuple(map(key, tensors(given))),
            str([v for v in given.values() if not tensors(v) and not isinstance(v, torch.Generator)]),
        )
        if place not in results:
            results[place] = op.reference(**given)
        return map_leaves(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, results[place])

    return call


def _wrong(out: Any) -> Any:
    return _changed(out, _last_off)


def _first_wrong(op: Op) -> Function:
    """As a table that is filled by the first call, and read before."""
    seen: set[Any] = set()

    def call(**given: Any) -> Any:
        out, shapes = op.reference(**given), tuple(value.shape for value in tensors(given))
        if shapes in seen:
            return out
        seen.add(shapes)
        return _wrong(out)

    return call


def _second_wrong(op: Op) -> Function:
    """As two buffers that are used by turns."""
    calls = count()

    def call(**given: Any) -> Any:
        out = op.reference(**given)
        return _wrong(out) if next(calls) % 2 else out

    return call


def _changing(op: Op, change: Callable[[], Any]) -> Function:
    def call(**given: Any) -> Any:
        out = op.reference(**given)
        change()
        return out

    return call
