"""Pools of ranks that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from ..families.examples import EXHAUSTIVE
from ..kinds import print_reached
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


@pytest.fixture(scope="package", autouse=True)
def reached() -> Iterator[None]:
    """Print, in the exhaustive profile, what the drawn cases of this folder reached."""
    yield
    if EXHAUSTIVE:
        print_reached()
