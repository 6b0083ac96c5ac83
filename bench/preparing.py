"""An op's inputs at one size, and each way to call it on them: the reference, and the compiled path's own arrangement.

Shapes: as in the oracle's records; R rows, C slots of a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compiled import attention, linear, mlp
from ..compiled.packing import Matrix
from ..oracle.case import Case, Inputs
from ..oracle.fast import STORAGE
from ..oracle.op import Fast, Op
from ..oracle.table import OPS
from ..reference.quantize import stored
from ..spec.config import INT4_GROUP, Storage
from ..spec.counts import Count
from ..spec.decoder import Path
from ..spec.weights import LinearWeights, MlpWeights
from .columns import Arguments, Column, fast_column, kept, matrix_of, unkept


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One op at one size in one storage."""

    case: Case
    inputs: Inputs
    """What the oracle judges on: weights as stored, exact, in float64."""
    given: Column
    """The inputs as anyone's function is given them: weights as stored, in float32."""
    reference: Column
    """The op's reference on the stored form, which it de-quantizes itself."""
    compiled: Column | None
    """The functions that the compiled path's graphs call; None where they never compute such a case."""
    bytes: int


def _by_weights(weights: LinearWeights, change: Callable[[Tensor], Tensor]) -> LinearWeights:
    return replace(weights, weight_NI=change(weights.weight_NI))


def _stored_bytes(weight_NI: Tensor, storage: Storage) -> int:
    rows, inputs = weight_NI.shape
    groups = rows * -(-inputs // INT4_GROUP)
    return Count(matrix=rows * inputs, rows=rows, groups=groups).bytes(storage)


def _bytes(op: Op, case: Case, matrices: list[Tensor], storage: Storage) -> int:
    """The record's bytes, with the matrices as stored in place of float32."""
    sizes = [(_stored_bytes(each, storage), _stored_bytes(each, Storage.FLOAT32)) for each in matrices]
    return op.bytes(case.n) + sum(as_stored - as_float32 for as_stored, as_float32 in sizes)


def _plain(op: Op, inputs: Inputs, from_memory: tuple[str, ...] = ()) -> Column:
    """The reference, or anyone's function, on inputs that no storage changes."""

    def reference(**given: Any) -> Any:
        return op.reference(**given)

    return Column(program=reference, arguments=inputs, from_memory=from_memory)


def twin_of(op: Op, function: Callable[..., Any]) -> Fast:
    """Return the op's twin of the compiled path with this function."""
    return next(twin for twin in op.fast[Path.COMPILED] if twin.function is function)


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """How the compiled path multiplies this many rows: by which function, filled up to which multiple."""

    batch: int
    tokens: int
    storage: Storage

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def few(self) -> bool:
        """As in a decode step; more are a prompt, or of float32 a decode step of many."""
        return self.rows <= (linear.PASS_ROWS if self.storage is Storage.FLOAT32 else _DECODED_ROWS)

    @property
    def in_passes(self) -> bool:
        return self.few and self.rows > 1

    @property
    def varies(self) -> bool:
        """Whether one graph serves any number of rows."""
        return self.rows > 1 and not self.in_passes

    def product(self, x_RI: Tensor, weights: Matrix) -> Tensor:
        return (linear.linear_decode if self.few else linear.linear_prefill)(x_RI, weights, self.storage)

    @property
    def name(self) -> str:
        return "linear_decode" if self.few else "linear_prefill"

    def through(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """All rows by a call that takes those of one pass."""
        given = linear.passes(self.rows, self.storage)

        def all_rows(x_RI: Tensor, **matrices: Any) -> Tensor:
            return torch.cat([call(x_RI=x_RI[rows], **matrices) for rows in given])[: self.rows]

        return all_rows if self.in_passes else call

    def of_linear(self, inputs: Inputs) -> Column:
        """The product of the record's twin for so many rows."""
        twin = twin_of(OPS["linear"], linear.linear_decode if self.few else linear.linear_prefill)
        column = fast_column(twin, inputs, from_memory=("weights",))
        if not self.varies:
            return column
        x_name = next(iter(column.arguments))
        x: Tensor = column.arguments[x_name]
        example = {**column.arguments, x_name: x[:1].expand(_EXAMPLE_ROWS, -1).contiguous()}
        return replace(column, varying={x_name: (0,)}, example=example)

    def column(self, program: Callable[..., Any], x_RI: Tensor, matrices: Arguments, note: str) -> Column:
        """A program (x_RI, **matrices) of these rows, compiled and called as the path does."""
        example_rows = linear.PASS_ROWS if self.in_passes else _EXAMPLE_ROWS
        example = {"x_RI": x_RI[:1].expand(example_rows, -1).contiguous(), **matrices} if self.rows > 1 else None
        return Column(
            program=program,
            arguments={"x_RI": x_RI, **matrices},
            from_memory=tuple(matrices),
            as_reference=lambda out: out.view(self.batch, self.tokens, -1),
            varying={"x_RI": (0,)} if self.varies else {},
            example=example,
            passes=self.through,
            note=note,
        )


_DECODED_ROWS = 32
_EXAMPLE_ROWS = 24  # not special to any size that is timed


def prepare_linear(case: Case, storage: Storage) -> Prepared:
    op = OPS["linear"]
    inputs = op.inputs(case)
    x: Tensor = inputs["x"]
    weights: LinearWeights = inputs["weights"]
    rows = _Rows(batch=case.n.B, tokens=case.n.T, storage=storage)

    def reference(x: Tensor, parts: tuple[Tensor, ...]) -> Any:
        return op.reference(x=x, weights=LinearWeights(weight_NI=unkept(parts, storage)))

    return Prepared(
        case=case,
        inputs={**inputs, "weights": _by_weights(weights, lambda w: stored(w, storage, torch.float64))},
        given=_plain(
            op, {**inputs, "weights": _by_weights(weights, lambda w: stored(w, storage, w.dtype))}, ("weights",)
        ),
        reference=Column(
            program=reference,
            arguments={"x": x, "parts": kept(weights.weight_NI, storage)},
            from_memory=("parts",),
        ),
        compiled=rows.of_linear({**inputs, STORAGE: storage}),
        bytes=_bytes(op, case, [weights.weight_NI], storage),
    )


def prepare_linear_w8a8(case: Case, storage: Storage) -> Prepared:
    """Weights are int8 whatever the storage says; activations become so on the way."""
    op = OPS["linear_w8a8"]
    inputs = op.inputs(case)
    column = fast_column(op.fast[Path.COMPILED][0], inputs, from_memory=("codes",))
    return _stored_nowhere(op, case, inputs, column, ("weights",))


def prepare_mlp(case: Case, storage: Storage) -> Prepared:
    op = OPS["mlp"]
    inputs = op.inputs(case)
    x_BTM: Tensor = inputs["x_BTM"]
    weights: MlpWeights = inputs["weights"]
    config = inputs["config"]
    assert weights.gate is not None
    three = [part.weight_NI for part in (weights.gate, weights.up, weights.down)]
    rows = _Rows(batch=case.n.B, tokens=case.n.T, storage=storage)

    def reference(x_BTM: Tensor, parts: tuple[tuple[Tensor, ...], ...]) -> Any:
        gate, up, down = (LinearWeights(weight_NI=unkept(part, storage)) for part in parts)
        return op.reference(x_BTM=x_BTM, weights=MlpWeights(gate=gate, up=up, down=down), config=config)

    def compiled(x_RI: Tensor, gate_up: Matrix, down: Matrix) -> Tensor:
        return rows.product(mlp.gated(rows.product(x_RI, gate_up), config.activation), down)

    def changed(change: Callable[[Tensor], Tensor]) -> MlpWeights:
        assert weights.gate is not None
        return MlpWeights(
            gate=_by_weights(weights.gate, change),
            up=_by_weights(weights.up, change),
            down=_by_weights(weights.down, change),
        )

    return Prepared(
        case=case,
        inputs={**inputs, "weights": changed(lambda w: stored(w, storage, torch.float64))},
        given=_plain(op, {**inputs, "weights": changed(lambda w: stored(w, storage, w.dtype))}, ("weights",)),
        reference=Column(
            program=reference,
            arguments={"x_BTM": x_BTM, "parts": tuple(kept(each, storage) for each in three)},
            from_memory=("parts",),
        ),
        compiled=rows.column(
            compiled,
            x_BTM.flatten(0, 1),
            {"gate_up": matrix_of(torch.cat(three[:2]), storage), "down": matrix_of(three[2], storage)},
            note=f"{rows.name} for gate and up as one, gated, {rows.name}",
        ),
        bytes=_bytes(op, case, three, storage),
    )


def prepare_rms_norm(case: Case, storage: Storage) -> Prepared:
    return _by_its_twin("rms_norm", case)


def prepare_activation(case: Case, storage: Storage) -> Prepared:
    return _by_its_twin("activation", case)


def prepare_rotate(case: Case, storage: Storage) -> Prepared:
    return _by_its_twin("rotate", case, note="rotate, its table of cos and sin made before")


def _by_its_twin(name: str, case: Case, note: str | None = None) -> Prepared:
    """Prepare an op with one fast twin, which works on what caches hold."""
    op = OPS[name]
    inputs = op.inputs(case)
    (twin,) = op.fast[Path.COMPILED]
    return _stored_nowhere(op, case, inputs, fast_column(twin, inputs, note=note))


def prepare_attention(case: Case, storage: Storage) -> Prepared:
    """One query a sequence as the decode graph attends; many, of one sequence, as the prefill graph does."""
    op, n = OPS["attention"], case.n
    inputs = op.inputs(case)
    from_memory = ("key_CKD", "value_CKD")
    varying: dict[str, tuple[int, ...]] = dict.fromkeys((*from_memory, "slot_S"), (0,))
    if n.T == 1:
        varying |= {"mask": (0, 1), "query_RHD": (0,), "position_R": (0,)} if n.B > 1 else {"mask": (1,)}
        column = fast_column(
            twin_of(op, attention.attend_decode),
            inputs,
            from_memory=from_memory,
            varying=varying,
            note="attend_decode, what each query sees found before",
        )
        return _stored_nowhere(op, case, inputs, column, ("key_BSKD", "value_BSKD"))
    varying |= {"query_THD": (0,), "mask_TS": (0, 1)}
    twin = twin_of(op, attention.attend_prefill)
    column = fast_column(twin, inputs, from_memory=from_memory, varying=varying)
    computed = n.B == 1  # the prefill graph takes one sequence
    return _stored_nowhere(op, case, inputs, column if computed else None, ("key_BSKD", "value_BSKD"))


def _stored_nowhere(
    op: Op, case: Case, inputs: Inputs, compiled: Column | None, from_memory: tuple[str, ...] = ()
) -> Prepared:
    """Of an op whose inputs no storage changes."""
    plain = _plain(op, inputs, from_memory)
    return Prepared(case=case, inputs=inputs, given=plain, reference=plain, compiled=compiled, bytes=op.bytes(case.n))
