"""`fit_scaling`: perplexity against parameters and against compute, decoder alone and decoder + memory.

Three sizes or more of a base, each with a memory: from reports that there are, or trained here.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlpmem_ds.benchmarks.common import check_places, describe_machine
from mlpmem_ds.benchmarks.quality.jobs import runner_of
from mlpmem_ds.benchmarks.quality.page import publish_scaling
from mlpmem_ds.benchmarks.quality.presets import PRESETS
from mlpmem_ds.benchmarks.scaling.config import Config
from mlpmem_ds.benchmarks.scaling.points import Point, read_points
from mlpmem_ds.benchmarks.scaling.power_law import MIN_SIZES
from mlpmem_ds.benchmarks.scaling.results import (
    FILE_NAME,
    PointFigures,
    ScalingResult,
    fit_points,
    plot_scaling,
    scaling_table,
    write_scaling,
)
from mlpmem_ds.benchmarks.scaling.sizes import SIZES, held_equal, make_jobs
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World


def run(config: Config, world: World) -> str:
    """Train what is missing, fit, write; the tables as text.

    Raises:
        UserError: a job failed, or the reports are of fewer than three sizes.
    """
    check_places(config.output, config.page, name="scaling")
    root = config.output.absolute()
    reports, text, equal = list(config.reports), "of the reports", "what the reports' trainings have alike"
    if config.preset is not None:
        preset = PRESETS[config.preset]
        jobs = make_jobs(preset, SIZES[config.preset], root)
        runner_of(root, config.jobs).run(jobs)
        reports = [root / size.name / "report" for size in SIZES[config.preset]]
        text, equal = preset.general.title, held_equal()
    result = fit_reports(reports, text=text, held_equal=equal)
    root.mkdir(parents=True, exist_ok=True)
    write_scaling(root / FILE_NAME, result)
    plot_scaling(result, root / "scaling.png")
    if config.page is not None:
        publish_scaling(config.page, result)
    return scaling_table(result)


def fit_reports(reports: Sequence[Path], *, text: str, held_equal: str) -> ScalingResult:
    """The fits of these reports; `text` and `held_equal` in words.

    Raises:
        UserError: they are of fewer than three sizes, no power law goes through them, or as
            `points.read_points`.
    """
    points = read_points(reports)
    num_sizes = len(np.unique([point.parameters for point in points if point.arm == points[0].arm]))
    if num_sizes < MIN_SIZES:
        raise UserError(
            f"--reports are of {num_sizes} sizes of base; a power law needs {MIN_SIZES} or more: train"
            " further sizes"
        )
    try:
        fits = fit_points(points)
    except ValueError as error:
        raise UserError(f"--reports: {error}: give reports of other sizes") from error
    return ScalingResult(
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        machine=f"{describe_machine()['processor']}",
        text=text,
        held_equal=held_equal,
        documents=len(points[0].positions_M),
        points=tuple(_figures(point) for point in points),
        fits=fits,
    )


def _figures(point: Point) -> PointFigures:
    return PointFigures(
        arm=point.arm,
        parameters=point.parameters,
        compute=point.compute,
        ppl=float(np.exp(point.loss)),
        base_is_past_best=point.base_is_past_best,
    )
