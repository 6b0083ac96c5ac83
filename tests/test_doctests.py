"""The examples in docstrings are right: pytest's own collector cannot map the packages onto one import name."""

import doctest
import pkgutil
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
PACKAGES = [*PROJECT["tool"]["setuptools"]["packages"], "twinfer.bench.peers"]
"""Those of the wheel, and what is run from a checkout only."""
MODULES = sorted(
    f"{package}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(import_module(package).__path__)
    if not module.ispkg and module.name != "__main__"
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    """Names that a docstring may use without importing them: its module's, and torch."""
    module = import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} fail (shown above)"


def test_every_package_is_read() -> None:
    """And there are examples at all."""
    finder = doctest.DocTestFinder()
    examples = {name: sum(len(found.examples) for found in finder.find(import_module(name))) for name in MODULES}
    assert {name.rpartition(".")[0] for name in MODULES} == set(PACKAGES)
    for package in ("reference", "compiled", "oracle"):
        assert sum(count for name, count in examples.items() if name.startswith(f"twinfer.{package}.")) >= 5, package
