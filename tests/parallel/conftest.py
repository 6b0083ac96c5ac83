"""Pools of ranks that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from .pool import Pool, started


@pytest.fixture(scope="package")
def two() -> Iterator[Pool]:
    with started(2) as pool:
        yield pool


@pytest.fixture(scope="package")
def four() -> Iterator[Pool]:
    with started(4) as pool:
        yield pool


@pytest.fixture(scope="package")
def six() -> Iterator[Pool]:
    with started(6) as pool:
        yield pool
