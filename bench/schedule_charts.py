"""A pipeline's schedule as a chart: a bar for each event, a row for each stage."""

from typing import TYPE_CHECKING

from ..reference.parallel.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def schedule_chart(schedule: Schedule) -> "Figure":
    """Draw a schedule; the color tells the micro-batch, the number the token, and what is white is bubble."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 0.35 * schedule.slots, 1 + 0.5 * schedule.stages), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab10"]
    for event in schedule.events:
        axes.barh(event.stage, 1, left=event.slot, color=colors(event.micro_batch % 10), edgecolor="white")
        axes.text(event.slot + 0.5, event.stage, str(event.token), ha="center", va="center", fontsize=8)
    axes.set(xlabel="slot", ylabel="stage", xlim=(0, schedule.slots), yticks=range(schedule.stages))
    axes.invert_yaxis()
    axes.set_title(f"{schedule.slots} slots, {schedule.bubble_fraction:.1%} bubbles", fontsize=9)
    return figure
