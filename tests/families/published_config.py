"""The config.json files of published models, as they were published."""

import json
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).parent / "published"


def published(name: str) -> dict[str, Any]:
    """Return the fields of one of them."""
    values: dict[str, Any] = json.loads((PUBLISHED / f"{name}.json").read_text())
    return values
