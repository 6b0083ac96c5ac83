"""A chart of a mixture's time over its number of experts, beside what reading them would take."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "moe-experts.png"


def write_experts_chart(rows: Sequence[Row], folder: Path) -> Path:
    """Write `experts_chart` into a folder."""
    file = folder / NAME
    experts_chart(rows).savefig(file, dpi=120)
    return file


def experts_chart(rows: Sequence[Row]) -> "Figure":
    """Return milliseconds over E in each storage, their floors, and the time that reading every expert would take."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot()
    for storage in dict.fromkeys(row.storage for row in rows):
        own = sorted((row for row in rows if row.storage == storage), key=lambda row: row.shape["E"])
        experts = [row.shape["E"] for row in own]
        (line,) = axes.plot(experts, [1e3 * (row.p50_s or 0) for row in own], marker="o", label=f"compiled {storage}")
        floors = [1e3 * (row.p50_s or 0) * (row.share_of_limit or 0) for row in own]
        axes.plot(experts, floors, linestyle="--", color=line.get_color(), label=f"floor of the chosen, {storage}")
        if storage == "float32":
            every = [1e3 * 12 * row.shape["E"] * row.shape["M"] * row.shape["F"] / _rate(row) for row in own]
            axes.plot(experts, every, color="black", linewidth=1, label="reading every expert, float32")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("experts E")
    axes.set_ylabel("milliseconds")
    axes.set_title(f"{rows[0].shape['T']} tokens, top-{rows[0].shape['K']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def _rate(row: Row) -> float:
    assert row.limits is not None
    return row.limits.read_bytes_per_s
