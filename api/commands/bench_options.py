"""The options of `twinfer bench model` and `twinfer bench peers`. Nothing slow is imported here."""

import argparse
import sys
from pathlib import Path

from twinfer.spec.config import Storage
from twinfer.spec.errors import RequestError
from twinfer.spec.naming import dtype_name

from .options import positive


def add_arguments(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """The options that both commands share."""
    parser.add_argument(
        "model",
        nargs="?",
        default="smollm2",
        metavar="MODEL",
        help="a folder, a .gguf file, or a built-in name (default %(default)s)",
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="to take medians over (%(default)s)")
    parser.add_argument(
        "--storage",
        action="append",
        type=dtype_name,
        choices=[each.value for each in Storage],
        default=[],
        help="only so; repeatable",
    )
    parser.add_argument(
        "--prompt", type=positive, default=32, metavar="N", help="tokens before a decode step (%(default)s)"
    )
    parser.add_argument("--steps", type=positive, default=steps, metavar="N", help="decode steps timed (%(default)s)")
    parser.add_argument("--batch", type=positive, action="append", metavar="N", help="beside 1 (8 and 32); repeatable")
    parser.add_argument(
        "--prefill", type=positive, action="append", metavar="N", help="prompts timed (512, 260, 300); repeatable"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows, one JSON object a line")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def check_out(path: Path | None) -> None:
    """Raise `RequestError` before anything is measured for a file that could not be written after."""
    if path is not None and not path.parent.is_dir():
        raise RequestError(f"--out is {path}; its folder {path.parent} is not there; make it first")


def say(message: str) -> None:
    """Tell on standard error what is being waited for."""
    print(message, file=sys.stderr, flush=True)
