"""`twinfer.load` and `generate`: paths from one table, dtypes by any of their names, parameters that are spelled."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import twinfer
from twinfer import paths
from twinfer.checkpoint import Checkpoint
from twinfer.commands.main import main
from twinfer.reference.path import ReferencePath
from twinfer.spec.config import Storage
from twinfer.spec.decoder import Path
from twinfer.spec.errors import RequestError


def test_every_path_has_a_builder() -> None:
    assert set(paths.BUILDERS) == set(Path)


def test_a_path_is_built_by_the_table_s_builder(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that `load` was given, and the seconds that the builder compiled."""
    orders = []

    def build(order: paths.Order) -> paths.Built:
        orders.append(order)
        return paths.Built(decoder=ReferencePath(order.source), compile_s=7.0)

    monkeypatch.setitem(paths.BUILDERS, Path.COMPILED, build)
    heard: list[str] = []
    model = twinfer.load(tiny, "compiled", "int8", "bfloat16", batches=False, report=heard.append)
    (order,) = orders
    assert (order.source, order.storage, order.compute) == (tiny.source, Storage.INT8, twinfer.Compute.BFLOAT16)
    assert (order.device, order.batches, order.report) == (torch.device("cpu"), False, heard.append)
    assert (model.path, model.compile_s) == (Path.COMPILED, 7.0)


SAME = [
    (torch.float64, "float64"),
    ("torch.float64", "float64"),
    ("double", "float64"),
    (torch.half, "float16"),
    (twinfer.Compute.BFLOAT16, "bfloat16"),
]


@pytest.mark.parametrize(("given", "name"), SAME, ids=[str(given) for given, _ in SAME])
def test_compute_may_be_a_dtype_or_any_of_its_names(tiny: Checkpoint, given: Any, name: str) -> None:
    assert twinfer.load(tiny, "reference", compute=given).compute.value == name


@pytest.mark.parametrize("given", [torch.bfloat16, "torch.bfloat16", torch.int8, "torch.int8", "int4", Storage.INT4])
def test_storage_may_be_a_dtype_or_any_of_its_names(tiny: Checkpoint, given: Any) -> None:
    assert twinfer.load(tiny, "reference", given).storage.value == str(given).removeprefix("torch.")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"compute": torch.int8}, "compute is 'int8'; it must be one of float32, float64, bfloat16, float16"),
        ({"compute": "float8"}, "compute is 'float8'; it must be one of float32, float64, bfloat16, float16"),
        ({"compute": "nn"}, "compute is 'nn'; it must be one of"),
        ({"storage": torch.float64}, "storage is 'float64'; it must be one of float32, bfloat16, int8, int4"),
        ({"path": "magic"}, "path is 'magic'; it must be one of reference, compiled"),
    ],
)
def test_values_that_are_none_of_these_are_told_which_are(tiny: Checkpoint, bad: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        twinfer.load(tiny, **bad)


def test_the_command_line_takes_the_same_names(
    tiny: Checkpoint, opens: Callable[[Checkpoint], None], capsys: pytest.CaptureFixture[str]
) -> None:
    opens(tiny)
    how = ["--path", "reference", "--compute", "torch.float64", "--storage", "torch.int8"]
    assert main(["generate", "tiny", "--prompt", "x", "--max-new-tokens", "1", "--json", *how]) == 0
    assert '"storage": "int8"' in (printed := capsys.readouterr().out)
    assert '"compute": "float64"' in printed


def test_generate_spells_the_loop_s_parameters() -> None:
    """`Model.generate` takes what `twinfer.generate` takes, with the same types and defaults, but what it knows itself:
    the path, the end tokens and the tokenizer."""
    loop = dict(inspect.signature(twinfer.generate).parameters)
    own = dict(inspect.signature(twinfer.Model.generate).parameters)
    known = {"decoder", "prompts", "end_tokens", "tokenizer"}
    assert {name: own[name] for name in own.keys() - {"self", "prompts", "chat", "date"}} == {
        name: loop[name] for name in loop.keys() - known
    }


def test_generate_hands_on_every_parameter(tiny: Checkpoint) -> None:
    """Asked for through the model or through the loop, the tokens are the same; with another value they are others."""
    model = twinfer.load(tiny, "reference")
    ids = model.tokenize("hello")
    how: dict[str, Any] = {"max_new_tokens": 9, "sampling": twinfer.Sampling(temperature=3.0), "seed": 5}
    own = {"end_tokens": tiny.end_tokens, "tokenizer": tiny.tokenizer}
    (of_model,), (of_loop,) = (
        model.generate(["hello"], **how).outputs(),
        twinfer.generate(model.decoder, [ids], **how, **own).outputs(),
    )
    assert of_model == of_loop
    others: dict[str, Any] = {"max_new_tokens": 8, "sampling": twinfer.Sampling(temperature=2.0), "seed": 6}
    for name, other in others.items():
        assert model.generate(["hello"], **{**how, name: other}).outputs() != [of_model], name
    assert of_model.text
    (stopped,) = model.generate(["hello"], **how, stop=[of_model.text[:1]]).outputs()
    assert stopped.stop is twinfer.Stop.STOP
