"""Each op's columns compute the op; copies outgrow the caches; bytes are those of the stored form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twinfer.bench import columns, ops
from twinfer.bench.columns import Column, kept, unkept
from twinfer.bench.settings import SETTINGS, Setting
from twinfer.oracle.trial import Trial
from twinfer.reference.quantize import stored
from twinfer.spec.config import Storage

SMALL: dict[str, tuple[dict[str, int], ...]] = {
    "linear": (
        {"B": 1, "T": 1, "I": 70, "N": 5},
        {"B": 2, "T": 3, "I": 70, "N": 5},
        {"B": 1, "T": 40, "I": 70, "N": 5},
    ),
    "mlp": ({"B": 1, "T": 2, "M": 9, "F": 66}, {"B": 1, "T": 40, "M": 9, "F": 66}),
    "rms_norm": ({"B": 2, "T": 3, "M": 12},),
    "linear_w8a8": ({"B": 1, "I": 70, "N": 35}, {"B": 5, "I": 70, "N": 35}),
    "activation": ({"B": 2, "T": 3, "F": 12},),
    "rotate": ({"B": 1, "T": 3, "H": 2, "D": 8, "J": 4},),
    "attention": (
        {"B": 2, "T": 1, "S": 7, "H": 4, "K": 2, "D": 8},
        {"B": 1, "T": 5, "S": 7, "H": 4, "K": 2, "D": 8},
    ),
}
CASES = [
    pytest.param(setting, shape, storage, id=f"{name}-{shape.get('T', shape['B'])}-{storage}")
    for name, setting in SETTINGS.items()
    for shape in SMALL[name]
    for storage in setting.storages
]


@pytest.mark.parametrize(("setting", "shape", "storage"), CASES)
def test_every_column_keeps_the_ops_guarantee(setting: Setting, shape: dict[str, int], storage: Storage) -> None:
    """On the same stored weights: the reference on the stored form, on what anyone is given, and the compiled one."""
    prepared = setting.prepare(setting.case(shape, seed=3), storage)
    columns = [prepared.reference, prepared.given, prepared.compiled]
    truth = ops._remembered(setting.op.reference)
    for column in columns:
        assert column is not None
        result = column.as_reference(column.passes(column.program)(**column.arguments))
        verdict = ops._judged(result, setting, prepared, truth)
        assert verdict is not None
        assert not verdict.failed, (column.note, verdict)
        assert ops._judged(result * 1.001, setting, prepared, truth).failed  # type: ignore[union-attr]


def test_the_axes_of_every_setting_are_the_ops() -> None:
    for setting in SETTINGS.values():
        for shape in (*setting.shapes, *setting.quick):
            assert tuple(shape) == tuple(setting.op.axes.split())


@pytest.mark.parametrize(
    ("storage", "weight_bytes"),
    [
        (Storage.FLOAT32, 4 * 300),
        (Storage.BFLOAT16, 2 * 300),
        (Storage.INT8, 300 + 4 * 3),
        (Storage.INT4, 150 + 2 * 4 * 3 * 2),
    ],
)
def test_bytes_are_of_the_stored_weights(storage: Storage, weight_bytes: int) -> None:
    """3 outputs of 100 inputs: a scale a row in int8, and in int4 a step and a lowest value for each of 2 groups."""
    setting = SETTINGS["linear"]
    prepared = setting.prepare(setting.case({"B": 1, "T": 2, "I": 100, "N": 3}, seed=0), storage)
    assert prepared.bytes == weight_bytes + 4 * 3 + 4 * 2 * (100 + 3)  # the record counts a bias; inputs and outputs


@pytest.mark.parametrize("storage", Storage)
def test_the_stored_form_holds_the_stored_weights(storage: Storage) -> None:
    weight_NI = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unkept(kept(weight_NI, storage), storage).float(), stored(weight_NI, storage, torch.float32))


def test_copies_outgrow_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal, in memory of their own, and taken in turn; what is not from memory stays where it is."""
    monkeypatch.setattr(columns, "last_level_cache_bytes", lambda: 1000)
    weight, x = torch.arange(75.0), torch.ones(3)  # 300 bytes
    seen: list[tuple[int, int]] = []

    def program(x: Tensor, parts: tuple[Tensor, ...]) -> None:
        assert torch.equal(parts[0], weight)
        seen.append((x.data_ptr(), parts[0].data_ptr()))

    column = Column(program=program, arguments={"x": x, "parts": (weight,)}, from_memory=("parts",))
    copies = column.copies()
    assert len(copies) == 14  # the first number of them with 4000 bytes or more
    call = columns.in_turn(program, copies)
    for _ in range(15):
        call()
    assert len({at for _, at in seen}) == 14
    assert {at for at, _ in seen} == {x.data_ptr()}
    assert seen[14] == seen[0]
    assert len(Column(program=program, arguments={"x": x}).copies()) == 1


def test_the_reference_is_computed_once_for_each_dtype() -> None:
    calls: list[torch.dtype] = []

    def reference(x: Tensor) -> Tensor:
        calls.append(x.dtype)
        return x

    remembered = ops._remembered(reference)
    trials: list[Callable[[], Any]] = [
        lambda: Trial(None, {"x": torch.ones(2)}, remembered, lambda x: x, ("N",))  # type: ignore[arg-type]
    ] * 2
    for make in trials:
        trial = make()
        assert trial.truth[0].dtype is torch.float64
        assert trial.eager[0].dtype is torch.float32
    assert calls == [torch.float64, torch.float32]


@pytest.mark.parametrize(
    ("storage", "tokens", "example", "passes"),
    [
        (Storage.FLOAT32, 1, None, [1]),
        (Storage.FLOAT32, 3, None, [4]),
        (Storage.FLOAT32, 4, None, [4]),
        (Storage.FLOAT32, 5, 24, [5]),
        (Storage.INT8, 1, None, [1]),
        (Storage.INT8, 3, None, [4]),
        (Storage.INT4, 6, 4, [4, 4]),
        (Storage.INT4, 32, 4, [4] * 8),
        (Storage.INT4, 33, 24, [33]),
    ],
)
def test_rows_are_given_as_the_path_gives_them(
    storage: Storage, tokens: int, example: int | None, passes: list[int]
) -> None:
    """Rows of a decode step in passes of four, of float32 in one; more by a graph for any number, compiled on 24."""
    setting = SETTINGS["linear"]
    shape = {"B": 1, "T": tokens, "I": 70, "N": 5}
    compiled = setting.prepare(setting.case(shape, seed=0), storage).compiled
    assert compiled is not None
    assert compiled.varying == ({"x_TI": (0,)} if example == 24 else {})
    assert (None if compiled.example is None else len(next(iter(compiled.example.values())))) == example
    seen: list[int] = []

    def call(**arguments: Any) -> Tensor:
        seen.append(len(next(iter(arguments.values()))))
        return compiled.program(**arguments)

    compiled.passes(call)(**compiled.arguments)
    assert seen == passes
