"""The command line: what it prints where, and with which exit status."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from twinfer.commands.main import main
from twinfer.commands.options import read_lines
from twinfer.commands.parser import COMMANDS
from twinfer.spec.counts import total
from twinfer.spec.paper_models import PAPER_MODELS

TINY = ["generate", "tiny", "--path", "reference", "--max-new-tokens", "5"]


def run(*words, **how):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "twinfer.commands.main", *words], capture_output=True, text=True, **how
    )


@pytest.fixture
def tiny_opens(tiny, opens):
    opens(tiny)


@pytest.mark.usefixtures("tiny_opens")
def test_json_and_text_tell_the_same(capsys):
    """--json prints one object with the documented keys; without it, its texts are streamed, a line each."""
    words = [*TINY, "--prompt", "hello", "--temperature", "1", "--seed", "3"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    assert capsys.readouterr().out == report["outputs"][0]["text"] + "\n"
    assert list(report) == [
        "model",
        "path",
        "storage",
        "compute",
        "device",
        "outputs",
        "timings",
        "peak_memory_bytes",
    ]
    assert [report[key] for key in list(report)[:5]] == ["tiny", "reference", "float32", "float32", "cpu"]
    assert list(report["timings"]) == [
        "load_s",
        "compile_s",
        "prefill_s",
        "decode_s",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    ]
    assert report["timings"]["compile_s"] == 0
    assert all(seconds > 0 for name, seconds in report["timings"].items() if name != "compile_s")
    (output,) = report["outputs"]
    assert len(output["prompt_ids"]) == len(output["ids"]) == 5
    assert output["stop"] == "length"
    assert report["peak_memory_bytes"] > 100 * 2**20  # an interpreter that has imported torch takes more


@pytest.mark.usefixtures("tiny_opens")
def test_a_prompts_file_gives_one_output_a_line_in_order(capsys, tmp_path):
    """Blank lines are skipped; text mode prints each output whole, in the file's order, under a heading."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first\n\n   \nsecond, longer\n", encoding="utf-8")
    words = [*TINY, "--prompts-file", str(prompts), "--temperature", "1"]
    assert main([*words, "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [len(output["prompt_ids"]) for output in outputs] == [5, 14]
    assert main(words) == 0
    streamed = "".join(f"--- prompt {index}\n{output['text']}\n" for index, output in enumerate(outputs))
    assert capsys.readouterr().out == streamed


@pytest.mark.usefixtures("tiny_opens")
def test_chat_puts_the_prompt_into_the_template(capsys, tiny):
    """The ids are those of the rendered template, in which special tokens are recognized."""
    assert main([*TINY, "--prompt", "hi", "--chat", "--json"]) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    text = "<turn>user:hi<end>\n<turn>"
    assert output["prompt_ids"] == tiny.tokenizer.encode(text)
    assert output["prompt_ids"].count(257) == 2


def test_without_a_tokenizer_ids_go_in_and_come_out(capsys, tiny, opens):
    opens(replace(tiny, tokenizer=None))
    words = [*TINY, "--prompt-ids", "7,8"]
    assert main([*words, "--json"]) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert output["text"] is None
    assert main(words) == 0
    assert [int(word) for word in capsys.readouterr().out.split()] == output["ids"]


BAD = {
    "nothing": ([], "arguments are required: COMMAND"),
    "unknown command": (["translate"], "invalid choice: 'translate'"),
    "unknown option": ([*TINY, "--prompt", "x", "--speed", "9"], "unrecognized arguments: --speed 9"),
    "no prompt": (TINY, "one of the arguments --prompt --prompt-ids --prompts-file is required"),
    "two prompts": ([*TINY, "--prompt", "x", "--prompt-ids", "1"], "not allowed with argument"),
    "empty prompt": ([*TINY, "--prompt", ""], "prompt 0 is empty"),
    "not ids": ([*TINY, "--prompt-ids", "1,two"], "'1,two' is not token ids"),
    "id too large": ([*TINY, "--prompt-ids", "1,258"], "token id 258; ids run from 0 to 257"),
    "negative id": ([*TINY, "--prompt-ids=-1"], "token id -1; ids run from 0 to 257"),
    "over the context": ([*TINY, "--prompt", "x" * 36], "the model's context is 40"),
    "nothing new": ([*TINY, "--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "temperature": ([*TINY, "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
    "temperature nan": ([*TINY, "--prompt", "x", "--temperature", "nan"], "temperature is nan"),
    "top-k": ([*TINY, "--prompt", "x", "--top-k", "0"], "top_k is 0"),
    "top-p": ([*TINY, "--prompt", "x", "--top-p", "1.5"], "top_p is 1.5"),
    "min-p": ([*TINY, "--prompt", "x", "--min-p", "2"], "min_p is 2.0"),
    "penalty": ([*TINY, "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    "seed": ([*TINY, "--prompt", "x", "--seed", "many"], "invalid int value: 'many'"),
    "empty stop": ([*TINY, "--prompt", "x", "--stop", ""], "empty string"),
    "half a character": ([*TINY, "--prompt", "\udce9"], "is not UTF-8 text"),
    "path": ([*TINY, "--prompt", "x", "--path", "magic"], "(choose from"),
    "storage": ([*TINY, "--prompt", "x", "--storage", "int3"], "(choose from"),
    "compute": ([*TINY, "--prompt", "x", "--compute", "float8"], "(choose from"),
    "device": (
        [*TINY, "--prompt", "x", "--device", "abacus"],
        "device is 'abacus'; on this machine it must be one of cpu",
    ),
    "absent device": ([*TINY, "--prompt", "x", "--device", "cuda:99"], "on this machine it must be one of cpu"),
    "no prompts file": ([*TINY, "--prompts-file", "/nowhere/prompts"], "No such file"),
    "line break in a name": ([*TINY, "--prompts-file", "/nowhere\nfor prompts"], "/nowhere for prompts cannot be read"),
    "chat with ids": ([*TINY, "--prompt-ids", "1", "--chat"], "--chat takes text"),
    "paper model": (
        ["generate", "lm-175b", "--prompt", "x"],
        "there are no weights of it; see `twinfer inspect lm-175b`",
    ),
}


@pytest.mark.usefixtures("tiny_opens")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, capsys):
    words, says = BAD[case]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("twinfer: error: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("lacking", "words", "says"),
    [
        ("tokenizer", ["--prompt", "x"], "tiny has no tokenizer (it comes without); give token ids instead of text"),
        ("chat_template", ["--prompt", "x", "--chat"], "tiny has no chat template"),
    ],
)
def test_what_the_model_lacks_is_named(lacking, words, says, capsys, tiny, opens):
    opens(replace(tiny, **{lacking: None}))
    assert main([*TINY, *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"), [(b"\n \n", "holds no prompt"), (b"caf\xe9\n", "is not UTF-8 text: byte 3 is wrong")]
)
@pytest.mark.usefixtures("tiny_opens")
def test_bad_prompts_files_are_named(content, says, capsys, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.write_bytes(content)
    assert main([*TINY, "--prompts-file", str(prompts)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("what", ["prompt", "text"])
@pytest.mark.parametrize("source", ["file", "-"])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbffirst\nsecond\n", ["first", "second"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfx", ["\ufeffx"]),
        (b"a\r\nb\rc\n\r\n", ["a", "b", "c"]),
    ],
)
def test_files_are_read_without_a_byte_order_mark(content, lines, source, what, tmp_path, monkeypatch):
    """Also from standard input, which is called "-"; lines end in any of the usual ways."""
    (tmp_path / "file").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    assert read_lines(source, what) == lines


def test_every_command_that_reads_a_file_reads_standard_input(tiny, opens, capsys, monkeypatch):
    opens(tiny)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbffirst\nsecond\n")))
    assert main([*TINY, "--prompts-file", "-", "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert [output["prompt_ids"] for output in outputs] == [tiny.tokenizer.encode(t) for t in ("first", "second")]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbffirst\nsecond\n")))
    assert main(["embed", "tiny", "--path", "reference", "--texts", "-", "--json", "--pooling", "mean"]) == 0
    assert [text["text"] for text in json.loads(capsys.readouterr().out)["texts"]] == ["first", "second"]


@pytest.mark.parametrize(("stdin", "says"), [(None, "is closed"), (b"", "holds no prompt"), (b"\xff", "is not UTF-8")])
def test_bad_standard_input_is_named(stdin, says, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
    assert main([*TINY, "--prompts-file", "-"]) == 2
    assert f"standard input {says}" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_opens")
def test_interrupt_and_closed_pipe_are_quiet(monkeypatch, capsys):
    """Control-C is status 130 and says nothing."""

    def interrupted(*_args, **_how):
        raise KeyboardInterrupt

    monkeypatch.setattr("twinfer.commands.generate.load", interrupted)
    assert main([*TINY, "--prompt", "x"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("tiny_opens")
def test_a_bug_keeps_its_traceback(monkeypatch):
    """Only errors raised on purpose become one line: the rest must be seen."""

    def broken(*_args, **_how):
        raise ZeroDivisionError

    monkeypatch.setattr("twinfer.commands.generate.load", broken)
    with pytest.raises(ZeroDivisionError):
        main([*TINY, "--prompt", "x"])


def test_help_suffices(capsys):
    """Every command explains itself, and --help names every option with a word on each."""
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        name = command.__name__.removeprefix("twinfer.commands.")
        assert name in overview
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code == 0
        assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("name", PAPER_MODELS)
def test_inspect_knows_the_papers_models(name, capsys):
    """Components add up to the total; every layer is described once."""
    assert main(["inspect", name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = PAPER_MODELS[name].config
    assert report["total"]["parameters"] == total(config).parameters
    assert sum(part["parameters"] for part in report["components"].values()) == report["total"]["parameters"]
    for storage, size in report["total"]["bytes"].items():
        assert sum(part["bytes"][storage] for part in report["components"].values()) == size
    assert sorted(index for layer in report["layers"] for index in layer["indices"]) == list(range(len(config.layers)))


def test_inspect_prints_a_table(capsys):
    assert main(["inspect", "24b-moe-128"]) == 0
    out = capsys.readouterr().out
    assert "layers 1, 3 ... 29: layer norm, 64 heads of 128, 128 experts, each a gelu_tanh MLP of 32768" in out
    assert f"{total(PAPER_MODELS['24b-moe-128'].config).parameters:,}" in out


def test_errors_and_closed_pipes_in_a_process_of_its_own(tmp_path):
    """One line on standard error, nothing on standard output, no traceback; a reader that leaves is no error."""
    missing = run("generate", str(tmp_path / "nothing"), "--prompt", "x")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("twinfer: error: ")
    assert missing.stderr.count("\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    piped = subprocess.run(
        [sys.executable, "-m", "twinfer.commands.main", "inspect", "gpt2-1.5b", "--json"],
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (piped.returncode, piped.stderr) == (141, b"")


def test_importing_twinfer_is_light():
    """Importing brings neither a compiler nor a test library nor anybody's model zoo."""
    heavy = (
        "torch._inductor",
        "torch._dynamo",
        "transformers",
        "hypothesis",
        "twinfer.oracle",
        "twinfer.compiled.path",
    )
    code = f"import sys, twinfer, twinfer.commands.main; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
