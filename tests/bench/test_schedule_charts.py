"""A schedule's chart has a bar for each event, where the event is."""

from pathlib import Path

from twinfer.bench.schedule_charts import schedule_chart
from twinfer.reference.parallel.schedule import hybrid


def test_a_bar_for_each_event(tmp_path: Path) -> None:
    schedule = hybrid(3, 4, 2, 3)
    figure = schedule_chart(schedule)
    (axes,) = figure.axes
    bars = [(bar.get_x(), round(bar.get_y() + bar.get_height() / 2)) for bar in axes.patches]
    assert sorted(bars) == sorted((event.slot, event.stage) for event in schedule.events)
    assert [text.get_text() for text in axes.texts] == [str(event.token) for event in schedule.events]
    figure.savefig(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes()[:4] == b"\x89PNG"
