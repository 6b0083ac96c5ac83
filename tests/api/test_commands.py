"""The one shape of all commands, and what they cost before they run."""

import subprocess
import sys
from pathlib import Path

import pytest

from twinfer.commands import bench, offload
from twinfer.commands import parser as parser_file
from twinfer.commands.main import main

SHARED = {"__init__", "main", "command", "console", "options", "parser", "bench_options", "degrees"}
PARENTS = (bench, offload)
FOLDER = Path(parser_file.__file__).parent


def test_every_file_is_a_command_of_a_table_or_shared_by_several() -> None:
    """A file's name is its command's, that of a subcommand with its parent's before it."""
    names = [each.NAME for each in parser_file.COMMANDS]
    names += [f"{parent.NAME}_{each.NAME}" for parent in PARENTS for each in parent.COMMANDS]
    assert len(set(names)) == len(names)
    assert {path.stem for path in FOLDER.glob("*.py")} == SHARED | set(names)


CALLED = {each.NAME: each for each in parser_file.COMMANDS}
CALLED |= {f"{parent.NAME} {each.NAME}": each for parent in PARENTS for each in parent.COMMANDS}


@pytest.mark.parametrize("words", CALLED)
def test_help_is_what_the_file_says(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The description and the epilog of its own file, and nothing else runs."""
    command = CALLED[words]
    with pytest.raises(SystemExit) as left:
        main([*words.split(), "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert command.DESCRIPTION.strip() in shown
    assert command.EPILOG.strip() in shown


def test_what_only_a_run_needs_is_not_imported_before() -> None:
    """Neither checkpoints nor a path nor the oracle: help and a mistyped option answer at once."""
    code = "import sys, twinfer.commands.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {f"twinfer.{package}" for package in ("checkpoint", "compiled", "oracle")} & set(loaded)
