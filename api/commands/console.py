"""What the commands say beside their results: on standard error, never on standard output."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twinfer.spec.errors import one_line


@contextmanager
def waiting() -> Iterator[Callable[[str], None]]:
    """A function that says what is being waited for: a spinner on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda message: print(one_line(message), file=sys.stderr, flush=True)
        return
    with console.status("loading") as status:
        yield lambda message: status.update(escape(one_line(message)))


def print_table(table: Table) -> None:
    """Print to standard output, at full width where that is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")


def print_json(value: Any) -> None:
    """Print one JSON object to standard output, on one line."""
    print(json.dumps(value, allow_nan=False))
