"""Part of `sweep`: what was found, as records; sweep.json, its figure, and its table.

A change is relative to the base's test perplexity (-0.05: five per cent less).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlpmem_ds.benchmarks.result_files import read_record, write_record
from mlpmem_ds.core.files import publish
from mlpmem_ds.core.typed_json import added_later
from mlpmem_ds.engines.plotting import new_figure, save_png
from mlpmem_ds.stages.report.table import markdown_table
from mlpmem_ds.stages.report.words import percent_text

FORMAT, VERSION = "sweep", 1
FILE_NAME = "sweep.json"
AXIS_TITLES = {
    "epochs": "epochs of every arm",
    "megabytes": "MB of text",
    "base_epochs": "epochs of the base",
}


@dataclass(frozen=True, kw_only=True)
class ArmChange:
    """An arm in one setting."""

    change: float
    """mean over the seeds"""
    by_seed: tuple[float, ...]
    interval: tuple[float, float]
    """95 %, over documents and seeds (quality/bootstrap.py)"""


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """All arms of one setting."""

    base_epochs: int
    megabytes: float
    """of the train split; of all splits where these are shares of the size"""
    epochs: int
    positions: int
    """of the train split"""
    base_ppl: float
    """on the domain's test split"""
    arms: Mapping[str, ArmChange]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All that was found."""

    date: str
    machine: str
    base: str
    """in words, as the texts"""
    general: str
    domain: str
    seeds: int
    axes: Mapping[str, tuple[float, ...]]
    """what was varied, around the first of the settings"""
    settings: tuple[SettingResult, ...]
    has_one_test_text: bool = field(default=False, metadata=added_later())
    """whether tuning and test text are those of every setting; else they are shares of each size of text"""

    def along(self, axis: str) -> list[SettingResult]:
        """The settings that differ from the first in this field alone, in the order of its values."""
        others = [name for name in self.axes if name != axis]
        centre = self.settings[0]
        found = [
            setting
            for setting in self.settings
            if all(getattr(setting, name) == getattr(centre, name) for name in others)
        ]
        return sorted(found, key=lambda setting: getattr(setting, axis))


def write_sweep(path: Path, result: SweepResult) -> None:
    write_record(path, result, kind=FORMAT, version=VERSION)


def read_sweep(path: Path) -> SweepResult:
    """Raises DamagedDataError as `read_record`."""
    return read_record(path, SweepResult, kind=FORMAT, version=VERSION, maker="bench sweep")


def plot_sweep(result: SweepResult, path: Path) -> None:
    """A panel an axis: the change of each arm, its seeds as points; the same result gives the same bytes."""
    figure = new_figure(11, 4)
    panels = figure.subplots(1, len(result.axes), sharey=True, squeeze=False)[0]
    for axes, axis in zip(panels, result.axes, strict=True):
        _draw(axes, axis, result.along(axis))
    panels[0].set_ylabel("change of test perplexity")
    panels[0].legend(fontsize=8)
    with publish(path) as temporary:
        save_png(figure, temporary)


def _draw(axes: Any, axis: str, settings: Sequence[SettingResult]) -> None:
    x = [getattr(setting, axis) for setting in settings]
    for number, arm in enumerate(settings[0].arms):
        found = [setting.arms[arm] for setting in settings]
        axes.plot(x, [one.change for one in found], color=f"C{number}", label=arm, linewidth=1.2)
        for place, one in zip(x, found, strict=True):
            axes.plot([place] * len(one.by_seed), one.by_seed, ".", color=f"C{number}", markersize=4)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=AXIS_TITLES.get(axis, axis))
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f} %")


def sweep_table(result: SweepResult) -> str:
    """A line a setting, the centre first; the best arm of each in bold."""
    arms = list(result.settings[0].arms)
    lines = []
    for setting in result.settings:
        best = min(arms, key=lambda arm: setting.arms[arm].change)
        changes = {arm: percent_text(setting.arms[arm].change) for arm in arms}
        lines.append(
            [
                f"{setting.base_epochs}",
                f"{setting.megabytes:g} ({setting.positions / 1e3:,.0f} k)",
                f"{setting.epochs}",
                f"{setting.base_ppl:.1f}",
                *(f"**{changes[arm]}**" if arm == best else changes[arm] for arm in arms),
            ]
        )
    header = ["base epochs", "MB (positions)", "epochs", "base", *(f"`{arm}`" for arm in arms)]
    return markdown_table(header, lines)
