"""What the drawn cases of this folder reached."""

from collections.abc import Iterator

import pytest

from ...families.examples import EXHAUSTIVE
from ...kinds import print_reached


@pytest.fixture(scope="package", autouse=True)
def reached() -> Iterator[None]:
    """Print it in the exhaustive profile."""
    yield
    if EXHAUSTIVE:
        print_reached()
