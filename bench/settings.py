"""At which sizes each op is timed. The op itself is its record in the oracle's table.

Shapes: as in the records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..oracle.case import Case, Option
from ..oracle.op import Op
from ..oracle.table import OPS
from ..spec.config import Activation, Storage
from . import preparing
from .preparing import Prepared

Shape = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How an op is timed."""

    op: Op
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    """For a look that takes seconds."""
    options: Mapping[str, Option]
    storages: tuple[Storage, ...] = (Storage.FLOAT32,)
    prepare: Callable[[Case, Storage], Prepared] = field(repr=False)

    def case(self, shape: Shape, seed: int) -> Case:
        return Case(op=self.op.name, sizes=shape, options=self.options, seed=seed)


_MODEL = (("qkv", 960, 576), ("up", 3072, 576), ("down", 576, 1536), ("head", 49152, 576))
"""SmolLM2-135M's products: outputs and inputs."""
_SQUARES = (4096, 8192)
_HEADS = {"H": 9, "K": 3, "D": 64}


def _linear(rows: int, outputs: int, inputs: int) -> Shape:
    return {"B": 1, "T": rows, "I": inputs, "N": outputs}


_ALL = (
    Setting(
        op=OPS["linear"],
        shapes=(
            *(_linear(rows, size, size) for size in _SQUARES for rows in (1, 4, 8, 32)),
            *(_linear(rows, outputs, inputs) for _, outputs, inputs in _MODEL for rows in (1, 4, 8, 32)),
            *(_linear(512, outputs, inputs) for _, outputs, inputs in _MODEL[:3]),
        ),
        quick=(_linear(1, 960, 576),),
        options={"bias": False, "weights": "float"},
        storages=tuple(Storage),
        prepare=preparing.prepare_linear,
    ),
    Setting(
        op=OPS["linear_w8a8"],
        shapes=tuple(
            {"B": rows, "I": inputs, "N": outputs}
            for outputs, inputs in ((4096, 4096), (3072, 576))
            for rows in (1, 4, 32, 512)
        ),
        quick=({"B": 1, "I": 576, "N": 960},),
        options={"bias": False},
        storages=(Storage.INT8,),
        prepare=preparing.prepare_linear_w8a8,
    ),
    Setting(
        op=OPS["mlp"],
        shapes=tuple({"B": 1, "T": rows, "M": 576, "F": 1536} for rows in (1, 8, 512)),
        quick=({"B": 1, "T": 1, "M": 64, "F": 128},),
        options={"kind": Activation.SILU.value, "gated": True, "bias": False},
        storages=tuple(Storage),
        prepare=preparing.prepare_mlp,
    ),
    Setting(
        op=OPS["rms_norm"],
        shapes=tuple({"B": 1, "T": rows, "M": size} for size in (576, 4096) for rows in (1, 512)),
        quick=({"B": 1, "T": 4, "M": 576},),
        options={"epsilon": 1e-5},
        prepare=preparing.prepare_rms_norm,
    ),
    Setting(
        op=OPS["activation"],
        shapes=tuple({"B": 1, "T": rows, "F": 1536} for rows in (1, 512)),
        quick=({"B": 1, "T": 4, "F": 1536},),
        options={"kind": Activation.SILU.value},
        prepare=preparing.prepare_activation,
    ),
    Setting(
        op=OPS["rotate"],
        shapes=tuple({"B": 1, "T": rows, "H": 12, "D": 64, "J": 32} for rows in (1, 512)),
        quick=({"B": 1, "T": 4, "H": 12, "D": 64, "J": 32},),
        options={"layout": "half_split", "start": 17, "attention_factor": 1.0, "positions": "range", "base": 10_000.0},
        prepare=preparing.prepare_rotate,
    ),
    Setting(
        op=OPS["attention"],
        shapes=(
            *({"B": batch, "T": 1, "S": seen, **_HEADS} for batch in (1, 8) for seen in (128, 1024)),
            {"B": 1, "T": 512, "S": 512, **_HEADS},
        ),
        quick=({"B": 1, "T": 1, "S": 64, **_HEADS}, {"B": 1, "T": 16, "S": 16, **_HEADS}),
        options={"causal": True, "window": None},
        prepare=preparing.prepare_attention,
    ),
)

SETTINGS: Mapping[str, Setting] = MappingProxyType({setting.op.name: setting for setting in _ALL})
