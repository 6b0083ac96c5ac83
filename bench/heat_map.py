"""A chart of how many tokens each expert of each layer serves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..spec.errors import MachineError, RequestError


def check_heat_map(file: Path) -> None:
    """Raise, before anything is computed, what would otherwise stop the chart at the end."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MachineError('charts need matplotlib; install it with: pip install "twinfer[bench]"') from None
    if not file.parent.is_dir():
        raise RequestError(f"the folder for {file.name}, {file.parent}, is not there; make it first")


def write_heat_map(layers: Sequence[tuple[int, Sequence[int]]], file: Path) -> None:
    """Write a row for each layer, given by its number and the tokens of each expert."""
    from matplotlib.figure import Figure

    width = max(len(tokens) for _, tokens in layers)
    rows = [[*tokens, *[float("nan")] * (width - len(tokens))] for _, tokens in layers]
    figure = Figure(figsize=(min(16, 3 + width / 4), min(16, 2 + len(layers) / 4)), layout="constrained")
    axes: Any = figure.add_subplot()
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(layers)), [str(index) for index, _ in layers])
    figure.colorbar(image, label="tokens")
    figure.savefig(file, format="png")
