"""An op's inputs at one size, and each way to call it on them: the reference, and the compiled path's own arrangement.

Shapes: as in the oracle's records; R rows, C slots of a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..compiled import attention, linear, mlp, norms, packing, rotary, w8a8
from ..oracle.case import Case, Inputs
from ..oracle.op import Op
from ..oracle.table import OPS
from ..reference.quantize import RowQuantized, stored
from ..spec.config import INT4_GROUP, Activation, Storage
from ..spec.counts import Count
from ..spec.weights import LinearWeights, MlpWeights
from .columns import Arguments, Column, kept, matrix_of, unkept


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
    arranged: Column | None
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

    def product(self, x_RI: Tensor, weights: packing.Matrix) -> Tensor:
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

    def arranged(x_RI: Tensor, matrix: packing.Matrix) -> Tensor:
        return rows.product(x_RI, matrix)

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
        arranged=rows.column(
            arranged, x.flatten(0, 1), {"matrix": matrix_of(weights.weight_NI, storage)}, note=rows.name
        ),
        bytes=_bytes(op, case, [weights.weight_NI], storage),
    )


def prepare_linear_w8a8(case: Case, storage: Storage) -> Prepared:
    """Weights are int8 whatever the storage says; activations become so on the way."""
    op = OPS["linear_w8a8"]
    inputs = op.inputs(case)
    x: Tensor = inputs["x"]
    weights: RowQuantized = inputs["weights"]
    form = w8a8.form_here(torch.device("cpu"))
    quantized_NI = weights.quantized_NI if form is w8a8.Form.INT8 else weights.quantized_NI.float()

    def arranged(x: Tensor, codes: w8a8.Codes) -> Tensor:
        return w8a8.linear_w8a8(x, codes, form)

    column = Column(
        program=arranged,
        arguments={"x": x, "codes": w8a8.Codes(quantized_NI, weights.scale_N, None)},
        from_memory=("codes",),
        note=f"linear_w8a8, products in {form}",
    )
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

    def arranged(x_RI: Tensor, gate_up: packing.Matrix, down: packing.Matrix) -> Tensor:
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
        arranged=rows.column(
            arranged,
            x_BTM.flatten(0, 1),
            {"gate_up": matrix_of(torch.cat(three[:2]), storage), "down": matrix_of(three[2], storage)},
            note=f"{rows.name} for gate and up as one, gated, {rows.name}",
        ),
        bytes=_bytes(op, case, three, storage),
    )


def prepare_rms_norm(case: Case, storage: Storage) -> Prepared:
    op = OPS["rms_norm"]
    inputs = op.inputs(case)
    x: Tensor = inputs["x"]
    epsilon = inputs["epsilon"]

    def arranged(x_TM: Tensor, gain_M: Tensor) -> Tensor:
        return norms.rms_norm(x_TM, gain_M, epsilon)

    column = Column(
        program=arranged,
        arguments={"x_TM": x.flatten(0, 1), "gain_M": inputs["weights"].gain_M},
        as_reference=lambda out: out.view(x.shape),
        note="rms_norm",
    )
    return _stored_nowhere(op, case, inputs, column)


def prepare_activation(case: Case, storage: Storage) -> Prepared:
    op = OPS["activation"]
    inputs = op.inputs(case)
    kind: Activation = inputs["kind"]

    def arranged(x: Tensor) -> Tensor:
        return mlp.activation(x, kind)

    column = Column(program=arranged, arguments={"x": inputs["x"]}, note="activation")
    return _stored_nowhere(op, case, inputs, column)


def prepare_rotate(case: Case, storage: Storage) -> Prepared:
    op = OPS["rotate"]
    inputs = op.inputs(case)
    x_BTHD: Tensor = inputs["x_BTHD"]
    layout = inputs["layout"]
    cos_TJ, sin_TJ = rotary.rotary_table(
        inputs["position_T"], inputs["frequency_J"], inputs["attention_factor"], compute=torch.float32
    )

    def arranged(x_THD: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
        return rotary.rotate(x_THD, cos_TJ, sin_TJ, layout)

    column = Column(
        program=arranged,
        arguments={"x_THD": x_BTHD.flatten(0, 1), "cos_TJ": cos_TJ, "sin_TJ": sin_TJ},
        as_reference=lambda out: out.view(x_BTHD.shape),
        note="rotate, its table of cos and sin made before",
    )
    return _stored_nowhere(op, case, inputs, column)


def prepare_attention(case: Case, storage: Storage) -> Prepared:
    """One query a sequence as the decode graph attends; many, of one sequence, as the prefill graph does."""
    op, n = OPS["attention"], case.n
    inputs = op.inputs(case)
    query_BTHD: Tensor = inputs["query_BTHD"]
    scale: float = inputs["scale"]
    caches = {"key_CKD": inputs["key_BSKD"].flatten(0, 1), "value_CKD": inputs["value_BSKD"].flatten(0, 1)}
    common = {"query": query_BTHD.flatten(0, 1), **caches, "slot_S": torch.arange(n.S)}

    def attend_decode(
        query: Tensor, key_CKD: Tensor, value_CKD: Tensor, slot_S: Tensor, start_R: Tensor, position_R: Tensor
    ) -> Tensor:
        return attention.attend_decode(
            query,
            key_CKD,
            value_CKD,
            mask=attention.decode_mask(start_R, position_R, slot_S, None, compute=torch.float32),
            position_R=position_R,
            slot_S=slot_S,
            scale=scale,
        )

    def attend_prefill(query: Tensor, key_CKD: Tensor, value_CKD: Tensor, slot_S: Tensor, mask_TS: Tensor) -> Tensor:
        return attention.attend_prefill(
            query, key_CKD, value_CKD, slot_S=slot_S, mask_TS=mask_TS, scale=scale, window=None
        )

    more: dict[str, Tensor]
    varying: dict[str, tuple[int, ...]] = dict.fromkeys((*caches, "slot_S"), (0,))
    if n.T == 1:
        program: Callable[..., Tensor] = attend_decode
        more = {"start_R": torch.arange(n.B) * n.S, "position_R": torch.full((n.B,), n.S - 1)}
        varying |= {name: (0,) for name in ("query", *more) if n.B > 1}
    else:
        program = attend_prefill
        varying |= {"query": (0,), "mask_TS": (0, 1)}
        more = {"mask_TS": attention.mask(torch.arange(n.S - n.T, n.S), torch.arange(n.S), None, compute=torch.float32)}
    column = Column(
        program=program,
        arguments={**common, **more},
        from_memory=("key_CKD", "value_CKD"),
        varying=varying,
        as_reference=lambda out: out.view(query_BTHD.shape),
        note=program.__name__,
    )
    computed = n.T == 1 or n.B == 1  # the prefill graph takes one sequence
    return _stored_nowhere(op, case, inputs, column if computed else None, ("key_BSKD", "value_BSKD"))


def _stored_nowhere(
    op: Op, case: Case, inputs: Inputs, arranged: Column | None, from_memory: tuple[str, ...] = ()
) -> Prepared:
    """Of an op whose inputs no storage changes."""
    plain = _plain(op, inputs, from_memory)
    return Prepared(case=case, inputs=inputs, given=plain, reference=plain, arranged=arranged, bytes=op.bytes(case.n))
