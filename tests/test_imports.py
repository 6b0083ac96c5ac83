"""Which package may import which: the table of the design, read from the sources.

A bug in one of two twins must not be able to leak into the other, so `compiled`, `parallel` and `offload` never import
`reference`, nor the other way round.
"""

import ast
import sys
import tomllib
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
    "api": EVERYTHING,
}
"""Other packages that a package may import. Packages that do not exist yet keep their line."""
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
    },
    "api": {"torch", "rich", "jinja2"},
}
"""Installed packages that a package may import; the standard library is free."""
PEERS = {
    *("numpy", "gguf", "tokenizers"),  # what the same model is written with for others
    *("transformers", "llama_cpp", "ctranslate2", "deepspeed", "accelerate"),  # those others
}
"""What bench/peers may import besides: it is run from a checkout, with the extra `peers`, and is not in the wheel."""


def imports(source: str, package: str, folder: str = "") -> Iterator[tuple[int, str]]:
    """Line and full dotted name of every import in a file of the package, lazy and type-checking ones included.

    `folder` is the file's own, within the package, dotted.
    """
    package = "twinfer" if package == "api" else f"twinfer.{package}"
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


def forbidden(source: str, package: str, folder: str = "") -> list[str]:
    """What a file of the package imports and may not, in words."""
    found = []
    installed = THIRD_PARTY[package] | (PEERS if (package, folder) == ("bench", "peers") else set())
    for line, name in imports(source, package, folder):
        top, *rest = name.split(".")
        if top == "twinfer":
            other = rest[0] if rest and rest[0] in EVERYTHING else "api"
            if other != package and other not in ALLOWED[package]:
                found.append(f"line {line}: {package} imports {name}, of the package {other}")
        elif top not in installed and not _is_standard(top):
            found.append(f"line {line}: {package} imports the package {top}")
    return found


def _is_standard(package: str) -> bool:
    return package in sys.stdlib_module_names


FILES = [
    pytest.param(package, path, id=f"{package}/{path.relative_to(ROOT / package)}")
    for package in ALLOWED
    for path in sorted((ROOT / package).rglob("*.py"))
]


def test_every_package_is_read() -> None:
    """A folder of Python files at the root is a package with a line in the table, or holds tests or scripts."""
    packages = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} - {"tests", "build", "docs", "training"}
    assert packages <= ALLOWED.keys()
    assert {"spec", "reference", "compiled", "checkpoint", "parallel", "oracle", "api"} <= {
        param.values[0] for param in FILES
    }
    assert ALLOWED.keys() == THIRD_PARTY.keys()


@pytest.mark.parametrize(("package", "path"), FILES)
def test_a_file_imports_what_its_package_may(package: str, path: Path) -> None:
    assert not forbidden(path.read_text(), package, ".".join(path.relative_to(ROOT / package).parent.parts))


def test_folders_within_a_package_are_no_way_out() -> None:
    assert forbidden("from ...reference import norms", "checkpoint", "families")
    assert not forbidden("from ...spec.config import Head\nfrom ..table import norm", "checkpoint", "families")


def test_peers_are_imported_by_their_command_only() -> None:
    """And only by what it runs: in an installed wheel they are not there."""
    using = []
    for param in FILES:
        package, path = param.values
        folder = ".".join(path.relative_to(ROOT / package).parent.parts)
        names = [name for _, name in imports(path.read_text(), package, folder)]
        if any(name.startswith("twinfer.bench.peers") for name in names) and (package, folder) != ("bench", "peers"):
            using.append(param.id)
    assert using == ["api/commands/bench_moe.py", "api/commands/bench_peers.py"]
    assert (
        "twinfer.bench.peers"
        not in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )


@pytest.mark.parametrize("package", ["compiled", "parallel", "offload", "checkpoint"])
def test_twins_stay_apart(package: str) -> None:
    """Said once more, whatever becomes of the table."""
    assert "reference" not in ALLOWED[package]
    assert package not in ALLOWED["reference"]


@pytest.mark.parametrize(
    ("package", "source"),
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
        ("parallel", "from ..reference.parallel.ledger import Ledger"),
        ("parallel", "from ..checkpoint import open_model"),
        ("bench", "import transformers"),
    ],
)
def test_seeded_violations_are_caught(package: str, source: str) -> None:
    assert forbidden(source, package)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("compiled", "from ..spec.config import ModelConfig\nfrom .packing import pack\nfrom . import norms"),
        ("oracle", "from ..reference import norms\nfrom ..compiled import norms as fast\nimport hypothesis"),
        ("api", "from twinfer.oracle.check import check_op\nfrom .cli import main\nimport argparse"),
    ],
)
def test_what_is_allowed_passes(package: str, source: str) -> None:
    assert not forbidden(source, package)
