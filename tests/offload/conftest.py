"""Ranks that wait for cases."""

from collections.abc import Iterator

import pytest

from ..parallel.pool import Pool, started


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with started(2) as pool:
        yield pool
