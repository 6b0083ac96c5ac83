"""Which room may import which: the table of the design, read from the sources.

A bug in one of two twins must not be able to leak into the other, so `compiled`, `parallel` and `offload` never import
`reference`, nor the other way round.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERYTHING = {"spec", "reference", "compiled", "checkpoint", "parallel", "offload", "oracle", "bench"}
ALLOWED: dict[str, set[str]] = {
    "spec": set(),
    "reference": {"spec"},
    "compiled": {"spec"},
    "checkpoint": {"spec"},
    "parallel": {"spec", "compiled"},
    "offload": {"spec", "compiled", "parallel"},
    "oracle": {"spec", "reference", "compiled", "checkpoint", "parallel", "offload"},
    "bench": EVERYTHING - {"bench"},
    "face": EVERYTHING,
}
"""Other rooms that a room may import. Rooms that do not exist yet keep their line."""
THIRD_PARTY: dict[str, set[str]] = {
    "spec": {"torch"},
    "reference": {"torch", "einops"},
    "compiled": {"torch"},
    "checkpoint": {"torch", "numpy", "safetensors", "gguf", "tokenizers"},
    "parallel": {"torch"},
    "offload": {"torch"},
    "oracle": {"torch", "einops", "numpy", "hypothesis"},
    "bench": {
        *("torch", "rich", "matplotlib"),
        *("numpy", "gguf", "tokenizers"),  # what the same model is written with for others
        *("transformers", "llama_cpp", "ctranslate2", "deepspeed"),  # those others
    },
    "face": {"torch", "rich", "jinja2"},
}
"""Installed packages that a room may import; the standard library is free."""


def imports(source: str, room: str, folder: str = "") -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import in a file of the room, lazy and type-checking ones included.

    `folder` is the file's own, within the room, dotted.
    """
    package = "twinfer" if room == "face" else f"twinfer.{room}"
    package += f".{folder}" if folder else ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            literals = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from ((node.lineno, name) for name in literals)


def forbidden(source: str, room: str, folder: str = "") -> list[str]:
    """What a file of the room imports and may not, in words."""
    found = []
    for line, name in imports(source, room, folder):
        top, *rest = name.split(".")
        if top == "twinfer":
            other = rest[0] if rest and rest[0] in EVERYTHING else "face"
            if other != room and other not in ALLOWED[room]:
                found.append(f"line {line}: {room} imports {name}, of the room {other}")
        elif top not in THIRD_PARTY[room] and not _is_standard(top):
            found.append(f"line {line}: {room} imports the package {top}")
    return found


def _is_standard(package: str) -> bool:
    return package in sys.stdlib_module_names


FILES = [
    pytest.param(room, path, id=f"{room}/{path.relative_to(ROOT / room)}")
    for room in ALLOWED
    for path in sorted((ROOT / room).rglob("*.py"))
]


def test_every_room_is_read() -> None:
    """A folder of Python files at the root is a room with a line in the table, or holds tests."""
    rooms = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} - {"tests", "build", "docs"}
    assert rooms <= ALLOWED.keys()
    assert {"spec", "reference", "compiled", "checkpoint", "oracle", "face"} <= {param.values[0] for param in FILES}
    assert ALLOWED.keys() == THIRD_PARTY.keys()


@pytest.mark.parametrize(("room", "path"), FILES)
def test_a_file_imports_what_its_room_may(room: str, path: Path) -> None:
    assert not forbidden(path.read_text(), room, ".".join(path.relative_to(ROOT / room).parent.parts))


def test_folders_within_a_room_are_no_way_out() -> None:
    assert forbidden("from ...reference import norms", "checkpoint", "families")
    assert not forbidden("from ...spec.config import Head\nfrom ..table import norm", "checkpoint", "families")


@pytest.mark.parametrize("room", ["compiled", "parallel", "offload", "checkpoint"])
def test_twins_stay_apart(room: str) -> None:
    """Said once more, whatever becomes of the table."""
    assert "reference" not in ALLOWED[room]
    assert room not in ALLOWED["reference"]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("compiled", "from ..reference.attention import attention"),
        ("compiled", "from .. import reference"),
        ("compiled", "import twinfer.reference.norms as norms"),
        ("compiled", "from twinfer import reference"),
        ("compiled", "def lazy():\n    from ..reference import norms"),
        (
            "compiled",
            "if TYPE_CHECKING:\n    from ..reference.path import ReferencePath",
        ),
        ("compiled", "import importlib\nimportlib.import_module('twinfer.reference.norms')"),
        ("compiled", "from einops import rearrange"),
        ("compiled", "from ..checkpoint import open_model"),
        ("reference", "from ..compiled.path import CompiledPath"),
        ("reference", "import transformers"),
        ("reference", "import numpy as np"),
        ("checkpoint", "import transformers"),
        ("checkpoint", "import pickle, transformers"),
        ("spec", "from ..reference import norms"),
        ("oracle", "from twinfer.generation import generate"),
        ("offload", "from ..reference.layer import layer"),
    ],
)
def test_seeded_violations_are_caught(room: str, source: str) -> None:
    assert forbidden(source, room)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("compiled", "from ..spec.config import ModelConfig\nfrom .packing import pack\nfrom . import norms"),
        ("oracle", "from ..reference import norms\nfrom ..compiled import norms as fast\nimport hypothesis"),
        ("face", "from twinfer.oracle.check import check_op\nfrom .cli import main\nimport argparse"),
    ],
)
def test_what_is_allowed_passes(room: str, source: str) -> None:
    assert not forbidden(source, room)
