"""Part of `quality`: one figure a preset: each arm's change of perplexity, on its text and on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.benchmarks.quality.results import Interval, QualityResult, TextResult
from mlpmem_ds.core.files import publish
from mlpmem_ds.engines.plotting import new_figure, save_png

_CUT = 0.6  # bars and intervals are cut off there, and a bar that is says how large its change is
_OWN, _OTHER = "C0", "C1"


def plot_changes(result: QualityResult, path: Path) -> None:
    """A panel a text, two bars an arm with their intervals, both within ±60 %; the same result gives the same
    bytes."""
    num_rows = max(len(text.rows) for text in result.texts)
    figure = new_figure(11, 1.6 + 0.42 * num_rows)
    panels = figure.subplots(1, len(result.texts), squeeze=False)[0]
    for axes, text in zip(panels, result.texts, strict=True):
        _draw_text(axes, text)
    panels[0].legend(loc="lower left", fontsize=8)
    figure.suptitle(f"Change of test perplexity against the base, preset {result.preset} (left is better)")
    with publish(path) as temporary:
        save_png(figure, temporary)


def _draw_text(axes: Any, text: TextResult) -> None:
    rows = [row for row in text.rows if row.change is not None]
    for level, row in enumerate(rows):
        _bar(axes, level - 0.18, row.change, row.interval, _OWN, "this text" if level == 0 else None)
        label = "other text, same choices" if level == 0 else None
        _bar(axes, level + 0.18, row.other_change, row.other_interval, _OTHER, label)
    axes.set_yticks(range(len(rows)), [row.arm for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(text.title, fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f} %")


def _bar(
    axes: Any, level: float, change: float | None, interval: Interval | None, colour: str, label: str | None
) -> None:
    if change is None or interval is None:
        return
    shown = max(-_CUT, min(_CUT, change))
    axes.barh(level, shown, height=0.34, color=colour, label=label)
    if shown != change:
        axes.annotate(f"{100 * change:+.0f} %", (shown, level), fontsize=7, va="center", ha="right")
    low, high = max(interval[0], -_CUT), min(interval[1], _CUT)
    if low <= high:
        axes.plot([low, high], [level, level], color="black", linewidth=1.2)
