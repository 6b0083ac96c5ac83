"""A run's rows for the terminal."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from .compare import Comparison
from .rows import Accuracy, Row, highest_limits, written
from .timing import geometric_mean

_COLUMNS = (
    "op",
    "shape",
    "storage",
    "implementation",
    "µs",
    "20 .. 80 %",
    "speed-up",
    "GB/s",
    "GFLOP/s",
    "of limit",
    "compile s\ncold / warm",
    "loops",
    "breaks",
    "error\n/ bound",
)
_LEFT = 4


def rows_table(rows: Sequence[Row]) -> Table:
    """One line a row; what was not measured is a dash."""
    limits = highest_limits(rows)
    title = None
    if limits is not None:
        title = (
            f"this machine reads up to {limits.read_bytes_per_s / 1e9:.3g} GB/s ({limits.read_by}) and multiplies "
            f"{limits.gemm_flops_per_s / 1e9:.4g} GFLOP/s ({limits.gemm_by})"
        )
    table = Table(title=title)
    for index, name in enumerate(_COLUMNS):
        table.add_column(name, justify="left" if index < _LEFT else "right")
    for row in rows:
        table.add_row(row.name, written(row.shape), row.storage, row.implementation, *_figures(row))
    return table


def _figures(row: Row) -> tuple[str, ...]:
    spread = None if row.p20_s is None or row.p80_s is None else f"{row.p20_s * 1e6:.4g} .. {row.p80_s * 1e6:.4g}"
    compiled = None
    if row.compile_cold_s is not None and row.compile_warm_s is not None:
        compiled = f"{row.compile_cold_s:.1f} / {row.compile_warm_s:.1f}"
    return (
        _number(None if row.p50_s is None else row.p50_s * 1e6),
        spread or "-",
        _number(row.speed_up, 3),
        _number(row.gb_per_s, 3),
        _number(row.gflop_per_s, 3),
        "-" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f} %",
        compiled or "-",
        _number(row.parallel_loops if row.launches is None else row.launches),
        "-" if row.graph_breaks is None else str(len(row.graph_breaks)),
        _accuracy(row),
    )


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _accuracy(row: Row) -> str:
    if row.accuracy is Accuracy.NOT_JUDGED:
        return "-"
    ratio = "inf" if row.error_over_bound is None else f"{row.error_over_bound:.2f}"
    return ratio if row.accuracy is Accuracy.PASSED else f"{ratio} FAILED"


def geometric_means(rows: Sequence[Row]) -> dict[str, float]:
    """Each implementation's speed-ups over the baseline, over everything that was timed."""
    speed_ups: dict[str, list[float]] = {}
    for row in rows:
        if row.speed_up is not None and row.implementation != row.baseline:
            speed_ups.setdefault(row.implementation, []).append(row.speed_up)
    return {implementation: geometric_mean(values) for implementation, values in speed_ups.items()}


def means_lines(means: Mapping[str, float], baseline: str) -> list[str]:
    return [f"{name}: {mean:.3g} times {baseline}, geometric mean" for name, mean in means.items()]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table has no room for: errors, and where graphs break."""
    lines = []
    for row in rows:
        if row.error is not None:
            lines.append(f"{row.title}: ERROR: {row.error}")
        lines += [f"{row.title}: graph break: {each}" for each in row.graph_breaks or ()]
        if row.recompiles:
            lines.append(f"{row.title}: {row.recompiles} more programs compiled after the first call")
    return lines


def comparison_lines(comparison: Comparison) -> list[str]:
    """Regressions first, then what is faster; the rest is counted."""
    changes = sorted(comparison.changes, key=lambda change: change not in comparison.regressions)
    lines = [f"warning: {warning}" for warning in comparison.warnings]
    lines += [change.text for change in changes if change.verdict != "same"]
    if comparison.only_old:
        lines.append(f"{len(comparison.only_old)} rows of the old file were not measured in this run")
    same = sum(change.verdict == "same" for change in changes)
    return [*lines, f"{len(comparison.regressions)} regressions; {same} of {len(changes)} rows the same within noise"]
