"""How many models a family's test draws."""

import os

from hypothesis import settings

EXHAUSTIVE = os.environ.get("HYPOTHESIS_PROFILE") == "exhaustive"


def drawn(models: int) -> settings:
    """So many, or thirty times as many under the exhaustive profile."""
    return settings(max_examples=30 * models if EXHAUSTIVE else models)
