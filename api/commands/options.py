"""Options that several commands share, and how their values are read."""

import argparse
import re
import sys
from pathlib import Path as FilePath

from twinfer.spec.config import Storage
from twinfer.spec.decoder import Path
from twinfer.spec.errors import RequestError
from twinfer.spec.naming import dtype_name

from ..paths import Compute

MODEL_HELP = (
    "a folder (Hugging Face: config.json, model.safetensors; or made by twinfer convert), a .gguf file, or the "
    "built-in name smollm2 (writes texts), tiny-moe (the same, offline) or minilm (embeds them)"
)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_context(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="the most tokens of a sequence, prompt included (default: as many as the model was made for)",
    )


def add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage",
        type=dtype_name,
        choices=[storage.value for storage in Storage],
        help="how weights are kept (default: as the model was converted, else float32)",
    )


def add_arithmetic(parser: argparse.ArgumentParser) -> None:
    """--path, --storage, --compute and --device, with the meaning that `twinfer.load` gives them."""
    parser.add_argument(
        "--path",
        choices=[path.value for path in Path],
        default=Path.COMPILED.value,
        help="compiled: fast, compiles first; reference: readable, slow (default %(default)s)",
    )
    add_storage(parser)
    add_compute(parser)
    add_device(parser)


def add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compute",
        type=dtype_name,
        choices=[compute.value for compute in Compute],
        default=Compute.FLOAT32.value,
        help="the arithmetic (default %(default)s; others are slow on CPUs without 16-bit units)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default %(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def unicode_text(text: str) -> str:
    """Refuse what the shell handed over in another encoding than UTF-8 (Python keeps it as half surrogate pairs)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8 text") from None
    return text


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def batch_size(text: str) -> int | str:
    """Read a number of at least 1, or "auto"."""
    return text if text == "auto" else positive(text)


def byte_count(text: str) -> int:
    """Read "256MB" (10 ** 6 bytes each), "1.5GiB" (2 ** 30 each) or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes; write it like 256MB or 1.5GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def add_memory_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-budget",
        type=byte_count,
        metavar="SIZE",
        help="for a store: the memory to use besides the interpreter's own, such as 512MB",
    )
    add_dram_budget(parser)


def add_dram_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dram-budget",
        type=byte_count,
        default=0,
        metavar="SIZE",
        help="of a store: memory besides in which weights, keys and values stay, not on the disk (default none)",
    )


def token_ids(text: str) -> list[int]:
    """Read "504,3575,282"."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not token ids; write them like 504,3575,282") from None


def read_lines(name: str, what: str) -> list[str]:
    """The lines of a UTF-8 text file, one prompt (or whatever it is) each, blank ones skipped; "-" is standard input.

    A byte order mark, which some editors write first, is no part of the text.
    """
    of = f"{what}s file {name}" if name != "-" else "standard input"
    try:
        content = FilePath(name).read_bytes() if name != "-" else _standard_input()
    except OSError as error:
        raise RequestError(f"{of} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in its name
        raise RequestError(f"{of} cannot be read: {error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{of} is not UTF-8 text: byte {error.start} is wrong") from error
    lines = [line for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n") if line.strip()]
    if not lines:
        raise RequestError(f"{of} holds no {what}; write one a line")
    return lines


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise RequestError("standard input is closed; give a file, or text to read there")
    return sys.stdin.buffer.read()
