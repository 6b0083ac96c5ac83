"""How commands end: streams that are closed or full, signals, names that a terminal would obey, no home."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twinfer.chat import render_chats
from twinfer.checkpoint import open_model
from twinfer.checkpoint.builtin import cache_folder
from twinfer.commands.main import main
from twinfer.spec.errors import LONGEST, CheckpointError, RequestError, TwinferError

COMMAND = [sys.executable, "-m", "twinfer.commands.main"]
INTERRUPTED_IMPORT = """
import os, signal, sys, time

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

sys.meta_path.insert(0, Interrupting())
"""
"""Sends the process control-C as it begins to import a module."""
TEXT = ["embed", "minilm", "--path", "reference", "--text", "caf\u00e9 \u65e5\u672c"]
WRITERS = {"help": ["generate", "--help"], "ops": ["ops"], "inspect": ["inspect", "gpt2-1.5b", "--json"]}
"""One for each way of writing: the parser's, a table, and JSON."""


def shell(words: list[str], redirection: str, **how: object) -> subprocess.CompletedProcess[str]:
    """The command as a shell starts it, its streams redirected."""
    script = f'exec "$@" {redirection}'
    command = ["bash", "-c", script, "bash", *COMMAND, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_the_output_lacks_are_replaced(encoding: str) -> None:
    """A table of Japanese texts is printed in an encoding that knows no Japanese, with ? for what it lacks."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([*COMMAND, *TEXT], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) in [(0, 0), (0, 1)]
    assert "caf\u00e9 ??".encode(encoding, "replace") in done.stdout


@pytest.mark.parametrize("words", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    ("redirection", "status", "says"),
    [
        (">&-", 2, "twinfer: error: standard output is closed; the result has nowhere to go\n"),
        ("> /dev/full", 2, "twinfer: error: the result cannot be written: No space left on device\n"),
        ("< /dev/null 1<&0", 2, "twinfer: error: the result cannot be written: Bad file descriptor\n"),
    ],
)
def test_output_that_cannot_be_written(words: list[str], redirection: str, status: int, says: str) -> None:
    """One line and status 2, whatever the command, and no traceback."""
    done = shell(words, redirection)
    errors = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("checking ")]
    assert (done.returncode, "".join(errors), done.stdout) == (status, says, "")


@pytest.mark.parametrize("words", WRITERS.values(), ids=WRITERS)
def test_a_reader_that_has_gone_is_status_141(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr.replace(b"\n", b"")) == (141, b"")


def test_errors_stay_off_the_output_where_their_stream_is_closed() -> None:
    """Python prints to standard output what should go to a standard error that is closed."""
    done = shell(["generate", "no-such-model", "--prompt", "x"], "2>&-")
    assert (done.returncode, done.stdout) == (2, "")
    done = shell(["generate", "no-such-model", "--prompt", "x"], "2> /dev/full")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    "said",
    ["\x1b[2J", "\x9b2J", "two\nlines", "\u202egnirts", "\ud800", "\x00", "a\rb", "x" * 100_000, "\x1b" * 99_999],
)
def test_messages_are_one_printable_line(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever chose the words: a template, a file, an argument. The remedy at the end is not cut off."""
    template = "{{ raise_exception(messages[0].content) }}"
    broken = "{{ ''[messages[0].content].x.y }}"
    for program, kind in ((template, RequestError), (broken, CheckpointError)):
        with pytest.raises(kind) as caught:
            render_chats(program, [[{"role": "user", "content": said}]], {})
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= LONGEST
    assert str(caught.value).endswith("; use the prompt without chat")
    with pytest.raises(TwinferError) as caught:
        open_model(said.replace("\x00", "\x01")[:200])
    assert str(caught.value).isprintable()
    for words in (["inspect", said[:200]], [said], ["generate", "smollm2", "--prompt", "x", "--device", said]):
        if "\x00" not in said:
            assert main(words) == 2
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert err.strip("\n").isprintable()
            assert len(err) < LONGEST + 40


@pytest.mark.parametrize("module", ["torch", "rich", "twinfer.spec.errors"])
@pytest.mark.parametrize(
    "entry", ["-m twinfer.commands.main", "-m twinfer", "-c from~twinfer.commands.main~import~main;main()"]
)
def test_control_c_while_modules_are_imported_is_silent(entry: str, module: str, tmp_path: Path) -> None:
    """Status 130 and not a word, however the command is started and whatever it is importing."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT.format(module=module))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    words = [word.replace("~", " ") for word in entry.split()]
    done = subprocess.run([sys.executable, *words, "ops"], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def interrupted_convert(folder: Path, number: int) -> int:
    """Start writing a model, send a signal in the middle, and return the exit status."""
    command = [*COMMAND, "convert", "smollm2", str(folder / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any(folder.glob(".out.partial-*/layer-00003.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    return process.wait()


def test_a_terminated_convert_leaves_nothing(tmp_path: Path) -> None:
    assert interrupted_convert(tmp_path, signal.SIGTERM) == 143
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_is_removed_by_the_next_run(tmp_path: Path) -> None:
    """Only what was begun for the same folder, by a process that is no more."""
    assert interrupted_convert(tmp_path, signal.SIGKILL) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    (tmp_path / ".other.partial-1").mkdir()
    command = [*COMMAND, "convert", "smollm2", str(tmp_path / "out"), "--storage", "int8"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.partial-1", "out"]


def test_without_a_home_the_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a home folder nor a passwd entry, or a user who does not exist, is one line with the remedy."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("TWINFER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "home", homeless)
        with pytest.raises(CheckpointError, match="TWINFER_CACHE is not set; set it to a folder"):
            cache_folder()
    monkeypatch.setenv("TWINFER_CACHE", "~nosuchuser/x")
    with pytest.raises(CheckpointError, match="TWINFER_CACHE is '~nosuchuser/x'; set it to a folder"):
        cache_folder()
    for path in ("~nosuchuser/x", "~nosuchuser"):
        with pytest.raises(CheckpointError, match=f"the path '{path}' cannot be followed"):
            open_model(path)
