"""Part of `evaluate`: eval.json's figures → the plots of the page. The same figures give the same bytes.

Each plot is a PNG of 9 by 4.5 inches; an arm has one colour in all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.core.files import publish
from mlpmem_ds.engines.plotting import new_figure, save_png
from mlpmem_ds.formats.evaluation import Breakdown, Evaluation
from mlpmem_ds.stages.report.breakdowns import KIND
from mlpmem_ds.stages.report.words import scaled_text

_FAR_WORSE = 0.5  # of the base's perplexity, on top of it


def plot_lambda_curves(evaluation: Evaluation, path: Path) -> None:
    """Perplexity over λ on the tuning split, a line an arm; level lines are arms without one λ of the grid:
    models alone, gates, banks.

    What is far worse than the base is cut off, and the legend says at what level it lies: the choices are to
    be seen.
    """
    figure, (axes,) = _figure(1)
    highest = 1.25 * evaluation.base.splits[evaluation.tuning_split].ppl
    chosen = []
    for number, arm in enumerate(evaluation.arms):
        tuning_ppl = arm.splits[evaluation.tuning_split].ppl
        chosen.append(tuning_ppl)
        if arm.tuning_curve is None:
            label = arm.name if tuning_ppl < highest else f"{arm.name}: {tuning_ppl:,.4g}, above"
            axes.axhline(tuning_ppl, linestyle="--", linewidth=1.5, color=f"C{number}", label=label)
            continue
        points = [point for point in arm.tuning_curve if point.ppl is not None]
        axes.plot(
            [point.lmbda for point in points],
            [point.ppl for point in points],
            marker=".",
            color=f"C{number}",
            label=arm.name,
        )
        axes.plot([arm.lmbda], [tuning_ppl], marker="o", markersize=9, fillstyle="none", color=f"C{number}")
    lowest = min(chosen) - 0.1 * (highest - min(chosen))
    axes.set_ylim(lowest, min(highest, max(axes.get_ylim()[1], lowest)))
    axes.set(
        xlabel="λ, weight of what is mixed with the base",
        ylabel=f"perplexity, {evaluation.tuning_split} split",
        title=f"How λ was chosen{'' if evaluation.choices_from is None else ' in another report'} (circles)",
    )
    axes.legend()
    _save(figure, path)


def plot_costs(evaluation: Evaluation, path: Path) -> None:
    """Bytes on disk, and microseconds to score a token, an arm a bar; the bars begin at 0."""
    figure, axes = _figure(2)
    names = [arm.name for arm in evaluation.arms]
    num_bytes = [float(arm.bytes) for arm in evaluation.arms]
    microseconds = [1e6 / arm.tokens_per_second for arm in evaluation.arms]
    panels = (
        ("bytes on disk", num_bytes, lambda value: scaled_text(value, "B")),
        ("time to score a token", microseconds, lambda value: f"{value:,.0f} µs"),
    )
    for axis, (title, values, label) in zip(axes, panels, strict=True):
        bars = axis.barh(names, values, color=[f"C{number}" for number in range(len(names))])
        axis.bar_label(bars, labels=[label(value) for value in values], padding=3)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.set(title=title, xticks=[])
    axes[1].set(yticks=[])
    _save(figure, path)


def plot_wins(evaluation: Evaluation, path: Path) -> None:
    """Nats won (right) and lost (left) a thousand positions by kind of token, a bar an arm; the dot is their
    sum.

    Arms far worse than the base do not stretch the axis: their bars are cut off.
    """
    groups = next(breakdown for breakdown in evaluation.breakdowns if breakdown.name == KIND)
    present = [number for number, positions in enumerate(groups.positions) if positions]
    close = _close_arms(evaluation, groups)
    figure, (axes,) = _figure(1)
    height = 0.8 / max(1, len(groups.arms))
    colours = _colours(evaluation)
    for row, (name, figures) in enumerate(groups.arms.items()):
        levels = [level - 0.4 + height * (row + 0.5) for level in range(len(present))]
        won = [1000 * figures.won[number] for number in present]
        lost = [1000 * figures.lost[number] for number in present]
        label = name if name in close else f"{name} (cut off)"
        axes.barh(levels, won, height=height, color=colours[name], label=label)
        axes.barh(levels, lost, height=height, color=colours[name], alpha=0.45)
        axes.plot([up + down for up, down in zip(won, lost, strict=True)], levels, "k.", markersize=4)
    labels = [f"{groups.labels[number]}\n{groups.positions[number]:,}" for number in present]
    axes.set_yticks(range(len(present)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    shown = [groups.arms[name] for name in close]
    max_lost = 1000 * max(-figures.lost[number] for figures in shown for number in present)
    max_won = 1000 * max(figures.won[number] for figures in shown for number in present)
    if max_lost + max_won > 0:  # else at its best λ nothing of any arm is mixed in
        margin = 0.05 * (max_lost + max_won)
        axes.set_xlim(-max_lost - margin, max_won + margin)
    axes.set(
        xlabel=(
            "← lost to the base (pale)    nats a 1,000 positions of the split, dots: the sum    won (full) →"
        ),
        title=f"Where the arms win and lose, {evaluation.test_split} split",
    )
    axes.legend(fontsize=8)
    _save(figure, path)


def _close_arms(evaluation: Evaluation, groups: Breakdown) -> list[str]:
    """The arms that are not far worse than the base; all, where each is."""
    changes = {arm.name: arm.ppl_change for arm in evaluation.arms if arm.ppl_change is not None}
    return [name for name in groups.arms if changes[name] < _FAR_WORSE] or list(groups.arms)


def plot_speeds(evaluation: Evaluation, path: Path) -> None:
    """Tokens a second over the number of stored keys; arms without a datastore are level lines."""
    figure, (axes,) = _figure(1)
    colours = _colours(evaluation)
    for name in dict.fromkeys(row.arm for row in evaluation.speeds):
        rows = [row for row in evaluation.speeds if row.arm == name]
        rates = [row.tokens_per_second for row in rows]
        if rows[0].keys is None:
            axes.axhline(rates[0], linestyle="--", color=colours[name], label=f"{name} (no keys)")
        else:
            axes.plot([row.keys for row in rows], rates, marker="o", color=colours[name], label=name)
    sizes = sorted({row.keys for row in evaluation.speeds if row.keys is not None})
    axes.set(
        xscale="log",
        xlabel="stored keys",
        ylabel="tokens scored a second",
        title="Speed against datastore size",
    )
    axes.set_xticks(sizes, [scaled_text(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper")
    _save(figure, path)


def _colours(evaluation: Evaluation) -> dict[str, str]:
    return {arm.name: f"C{number}" for number, arm in enumerate(evaluation.arms)}


def _figure(num_panels: int) -> tuple[Any, list[Any]]:
    figure = new_figure(9, 4.5)
    return figure, [figure.add_subplot(1, num_panels, panel + 1) for panel in range(num_panels)]


def _save(figure: Any, path: Path) -> None:
    with publish(path) as temporary:
        save_png(figure, temporary)
