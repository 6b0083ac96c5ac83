"""`twinfer convert`, and models that are loaded from what it wrote or from what is open already."""

import json
from pathlib import Path

import pytest

import twinfer
from twinfer.checkpoint import open_model
from twinfer.commands.main import main
from twinfer.oracle.case import RandomPicker
from twinfer.oracle.models import RandomSource, draw_model_config
from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError


def test_the_trained_model_converted_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text, chat and end tokens included, in int8 by default since that is what the folder holds."""
    assert main(["convert", "smollm2", str(tmp_path / "out"), "--storage", "int8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["storage"] == "int8"
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    model = twinfer.load(str(tmp_path / "out"), path="reference")
    assert model.storage is Storage.INT8
    (output,) = model.generate(["What is the capital of France?"], chat=True, max_new_tokens=9).outputs()
    assert output.text == "The capital of France is Paris."
    assert output.stop is twinfer.Stop.END


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smollm2", "."], ". is there already; give a folder that does not exist yet"),
        (["smollm2", "no/such/out"], "no/such is no folder; make it first"),
        (["nothing", "out"], "there is no model 'nothing'"),
        (["smollm2", "out", "--storage", "int3"], "invalid choice: 'int3'"),
        (["smollm2", "out", "--context", "9000"], "the context asked for is 9000 tokens; in this model"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_weights_loads_without_a_tokenizer() -> None:
    source = RandomSource(draw_model_config(RandomPicker(5)))
    model = twinfer.load(source, path="reference")
    assert model.checkpoint.tokenizer is None
    assert len(model.generate([[0, 1]], max_new_tokens=3).outputs()[0].ids) == 3


def test_an_open_model_has_its_context_already() -> None:
    with pytest.raises(RequestError, match="context is given for a model that is open already"):
        twinfer.load(open_model("smollm2"), path="reference", context=10)
