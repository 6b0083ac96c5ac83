"""Two charts of a run's rows, as PNG files: the roofline, and the speed-ups."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec.errors import MachineError, RequestError
from .rows import Row, highest_limits
from .timing import geometric_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOFLINE = "roofline.png"
SPEED_UPS = "speed-ups.png"


def check_charts(folder: Path) -> None:
    """Raise, before anything is timed, what would otherwise stop the charts at the end."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MachineError('charts need matplotlib; install it with: pip install "twinfer[bench]"') from None
    if not folder.is_dir():
        raise RequestError(f"the folder for charts, {folder}, is not there; make it first")


def write_charts(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write both charts; returns their files."""
    written = []
    for name, figure in ((ROOFLINE, roofline(rows)), (SPEED_UPS, speed_up_bars(rows))):
        figure.savefig(folder / name, dpi=120)
        written.append(folder / name)
    return written


def roofline(rows: Sequence[Row]) -> "Figure":
    """Operations a second over operations a byte, one point a row, under what the machine can do.

    A point on the slope waits for memory, one under the flat part multiplies.
    """
    figure, axes = _empty("operations / byte", "GFLOP/s")
    timed = [row for row in rows if row.gflop_per_s and row.flops and row.bytes]
    for implementation in _implementations(timed):
        own = [row for row in timed if row.implementation == implementation]
        intensities = [(row.flops or 0) / (row.bytes or 1) for row in own]
        axes.scatter(intensities, [row.gflop_per_s for row in own], s=18, alpha=0.8, label=implementation)
    limits = highest_limits(timed)
    if limits is not None:
        ridge = limits.gemm_flops_per_s / limits.read_bytes_per_s
        least = min([(row.flops or 0) / (row.bytes or 1) for row in timed] + [ridge])
        most = max([(row.flops or 0) / (row.bytes or 1) for row in timed] + [2 * ridge])
        intensities = [least, ridge, most]
        limit = [min(limits.read_bytes_per_s * each, limits.gemm_flops_per_s) / 1e9 for each in intensities]
        axes.plot(intensities, limit, color="black", linewidth=1, label="limit of this machine")
        axes.set_title(
            f"{limits.read_bytes_per_s / 1e9:.3g} GB/s ({limits.read_by}), "
            f"{limits.gemm_flops_per_s / 1e9:.4g} GFLOP/s ({limits.gemm_by})",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


def speed_up_bars(rows: Sequence[Row]) -> "Figure":
    """For each op and storage, one bar an implementation: the geometric mean over shapes of its speed-ups."""
    figure, axes = _empty("", "times the baseline")
    timed = [row for row in rows if row.speed_up is not None]
    groups = list(dict.fromkeys((row.name, row.storage) for row in timed))
    implementations = [name for name in _implementations(timed) if any(row.baseline != name for row in timed)]
    width = 0.8 / max(1, len(implementations))
    for index, implementation in enumerate(implementations):
        places, heights = [], []
        for place, group in enumerate(groups):
            own = [
                row.speed_up
                for row in timed
                if (row.name, row.storage) == group and row.implementation == implementation and row.speed_up
            ]
            if own:
                places.append(place - 0.4 + (index + 0.5) * width)
                heights.append(geometric_mean(own))
        axes.bar(places, heights, width, label=implementation)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(range(len(groups)), [f"{name}\n{storage}" for name, storage in groups], fontsize=7, rotation=45)
    axes.legend(fontsize=8)
    return figure


def _empty(across: str, up: str) -> "tuple[Figure, Any]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes: Any = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _implementations(rows: Sequence[Row]) -> list[str]:
    """In the order in which they first stand."""
    return list(dict.fromkeys(row.implementation for row in rows))
