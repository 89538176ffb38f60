"""Part of `fit_scaling`: what was fitted, as records; scaling.json, its figure, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlpmem_ds.benchmarks.result_files import read_record, write_record
from mlpmem_ds.benchmarks.scaling.points import DECODER, Point, drawn_losses
from mlpmem_ds.benchmarks.scaling.power_law import (
    MIN_SIZES_WITH_FLOOR,
    PowerLaw,
    exponent_interval,
    fit_power_law,
)
from mlpmem_ds.core.files import publish
from mlpmem_ds.core.typed_json import added_later
from mlpmem_ds.engines.plotting import new_figure, save_png
from mlpmem_ds.stages.report.table import markdown_table
from mlpmem_ds.stages.report.words import scaled_text

FORMAT, VERSION = "scaling", 1
FILE_NAME = "scaling.json"
_AXES = {"parameters": "", "compute": "FLOP"}
"""what a law is over → its unit"""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A power law of one arm over one axis."""

    arm: str
    axis: str
    """parameters, or compute in floating-point operations"""
    has_floor: bool
    scale: float
    exponent: float
    floor: float
    interval: tuple[float, float]
    """95 %, of the exponent, over draws of whole documents"""


@dataclass(frozen=True, kw_only=True)
class PointFigures:
    """A point as it is drawn."""

    arm: str
    parameters: float
    compute: float
    ppl: float
    base_is_past_best: bool | None = field(default=None, metadata=added_later())
    """whether its base was best on the tuning split before its last step; None: not recorded, or it was not
    validated"""


@dataclass(frozen=True, kw_only=True)
class ScalingResult:
    """All that was found."""

    date: str
    machine: str
    text: str
    """in words"""
    held_equal: str
    """in words"""
    documents: int
    points: tuple[PointFigures, ...]
    fits: tuple[Fit, ...]


def fit_points(points: Sequence[Point]) -> tuple[Fit, ...]:
    """The power laws of each arm over each axis; with a floor too where there are sizes enough.

    Raises:
        ValueError: fewer than three sizes.
    """
    fits = []
    losses_RP = drawn_losses(points)
    for arm in dict.fromkeys(point.arm for point in points):
        columns = [number for number, point in enumerate(points) if point.arm == arm]
        loss_P = np.array([points[number].loss for number in columns])
        for axis in _AXES:
            x_P = np.array([getattr(points[number], axis) for number in columns])
            for has_floor in (False, True)[: 1 + (len(np.unique(x_P)) >= MIN_SIZES_WITH_FLOOR)]:
                law = fit_power_law(x_P, loss_P, has_floor=has_floor)
                interval = exponent_interval(x_P, losses_RP[:, columns], has_floor=has_floor)
                fits.append(Fit(arm=arm, axis=axis, has_floor=has_floor, interval=interval, **vars(law)))
    return tuple(fits)


def write_scaling(path: Path, result: ScalingResult) -> None:
    write_record(path, result, kind=FORMAT, version=VERSION)


def read_scaling(path: Path) -> ScalingResult:
    """Raises DamagedDataError as `read_record`."""
    return read_record(path, ScalingResult, kind=FORMAT, version=VERSION, maker="fit_scaling")


def plot_scaling(result: ScalingResult, path: Path) -> None:
    """Perplexity over parameters and over compute: points, and the power laws without a floor."""
    figure = new_figure(10, 4.2)
    for axes, (axis, unit) in zip(figure.subplots(1, 2), _AXES.items(), strict=True):
        for number, arm in enumerate(dict.fromkeys(point.arm for point in result.points)):
            points = [point for point in result.points if point.arm == arm]
            x = np.array([getattr(point, axis) for point in points])
            axes.plot(x, [point.ppl for point in points], "o", color=f"C{number}", label=arm)
            fit = next(fit for fit in result.fits if (fit.arm, fit.axis, fit.has_floor) == (arm, axis, False))
            law = PowerLaw(scale=fit.scale, exponent=fit.exponent, floor=fit.floor)
            line = np.geomspace(x.min(), x.max(), 50)
            axes.plot(line, np.exp(law(line)), color=f"C{number}", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="test perplexity")
        # Each point named on the axis: powers of ten leave most of so small a range without a number.
        sizes = sorted({getattr(point, axis) for point in result.points})
        axes.set_xticks(sizes, labels=[scaled_text(size, unit) for size in sizes], rotation=60)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    figure.axes[0].legend()
    with publish(path) as temporary:
        save_png(figure, temporary)


def bases_at_their_best(result: ScalingResult) -> str:
    """Which bases more steps might have made better, as sentences."""
    bases = [point for point in result.points if point.arm == DECODER]
    kinds = (
        ("Bases that were at their best at their last step, so not yet at an end", False),
        ("Not recorded whether more steps might have made these bases better", None),
    )
    lines = []
    for what, is_past_best in kinds:
        sizes = [scaled_text(base.parameters) for base in bases if base.base_is_past_best is is_past_best]
        if sizes:
            lines.append(f"{what}: {', '.join(sizes)}.")
    return " ".join(lines)


def scaling_table(result: ScalingResult) -> str:
    """The points and the exponents as two Markdown tables."""
    points = [
        [point.arm, scaled_text(point.parameters), scaled_text(point.compute, "FLOP"), f"{point.ppl:.2f}"]
        for point in result.points
    ]
    fits = [
        [
            fit.arm,
            fit.axis,
            f"a·x^-b{' + c' if fit.has_floor else ''}",
            f"{fit.exponent:.4f}",
            f"{fit.interval[0]:.4f} … {fit.interval[1]:.4f}",
            f"{fit.floor:.2f}" if fit.has_floor else "–",
        ]
        for fit in result.fits
    ]
    return "\n\n".join(
        (
            markdown_table(["arm", "parameters", "compute", "ppl"], points),
            markdown_table(["arm", "over", "loss in nats", "exponent b", "95 % interval", "c"], fits),
        )
    )
