"""A chart of what is read, computed and waited for: `python -m twinfer.bench.offload_timeline STORE BUDGET FILE.png`.

A decode step of one sequence, uncompiled, after two that are not shown.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checkpoint.config_json import from_json
from ..offload.events import Event, Kind, at_once, overlap_s, seconds
from ..offload.path import OffloadPath
from ..offload.store import open_store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {
    Kind.READ: "tab:blue",
    Kind.USE: "tab:green",
    Kind.WAIT: "tab:red",
    Kind.KV_READ: "tab:cyan",
    Kind.KV_WRITE: "tab:purple",
    Kind.KV_WAIT: "tab:orange",
}


def timeline(events: Sequence[Event]) -> "Figure":
    """Return a chart with one line for each kind of event that there is, reads by the buffer they go to."""
    from matplotlib.figure import Figure

    begin_s = min(each.begin_s for each in events)
    lines = sorted({_line(each) for each in events})
    figure = Figure(figsize=(11, 0.6 * len(lines) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    for each in events:
        bar = ((each.begin_s - begin_s) * 1e3, (each.end_s - each.begin_s) * 1e3)
        axes.broken_barh(
            [bar], (lines.index(_line(each)) - 0.4, 0.8), color=_COLORS[each.kind], edgecolor="white", lw=0.3
        )
    axes.set_yticks(range(len(lines)), lines)
    axes.set_xlabel("milliseconds")
    share = overlap_s(events) / seconds(events, Kind.READ)
    many = at_once(events, Kind.READ)
    axes.set_title(f"{share:.0%} of the time of reads lies within that of computing; {many:.1f} reads at a time")
    return figure


def _line(event: Event) -> str:
    return f"{event.kind}, buffer {event.slot}" if event.kind is Kind.READ else str(event.kind)


def main(folder: Path, budget: int, file: Path) -> None:
    """Run and write the chart."""
    store = open_store(folder)
    path = OffloadPath(store, from_json(store.model["config"], str(folder)), budget=budget, mode="eager")
    state = path.open(1, 8)
    for token in range(3):
        before = len(path.events)
        path.extend(state, [torch.tensor([token])])
    begin_s = path.events[before].begin_s
    shown = [each for each in path.events if each.begin_s >= begin_s]
    path.close()
    timeline(shown).savefig(file, dpi=110)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
