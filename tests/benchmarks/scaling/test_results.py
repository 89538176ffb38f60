"""Points of known power laws → fits, JSON, tables, figure, and their section of the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.page import publish_scaling
from mlpmem_ds.benchmarks.scaling.points import DECODER, WITH_MEMORY, Point
from mlpmem_ds.benchmarks.scaling.results import (
    PointFigures,
    ScalingResult,
    bases_at_their_best,
    fit_points,
    read_scaling,
    scaling_table,
    write_scaling,
)
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json

POSITIONS_M = np.array([100, 300, 50, 80])


def _points(num_sizes: int) -> list[Point]:
    """Losses of exponents .1 alone and .12 with a memory over parameters, half over compute."""
    points = []
    for arm, scale, exponent in ((DECODER, 20.0, 0.1), (WITH_MEMORY, 25.0, 0.12)):
        for parameters in 1e6 * 2.0 ** np.arange(num_sizes):
            loss = scale * parameters**-exponent
            points.append(
                Point(
                    arm=arm,
                    parameters=parameters,
                    compute=parameters**2,
                    loss=loss,
                    base_is_past_best=bool(parameters != 2e6),
                    positions_M=POSITIONS_M,
                    sums_M=-loss * POSITIONS_M,
                )
            )
    return points


def _result() -> ScalingResult:
    points = _points(4)
    return ScalingResult(
        date="2026-01-02",
        machine="a processor",
        text="a manual",
        held_equal="the text",
        documents=4,
        points=tuple(
            PointFigures(
                arm=point.arm,
                parameters=point.parameters,
                compute=point.compute,
                ppl=float(np.exp(point.loss)),
                base_is_past_best=point.base_is_past_best,
            )
            for point in points
        ),
        fits=fit_points(points),
    )


def test_exponents_are_those_of_the_points() -> None:
    fits = {(fit.arm, fit.axis): fit for fit in fit_points(_points(3))}
    assert {key: fit.exponent for key, fit in fits.items()} == pytest.approx(
        {
            (DECODER, "parameters"): 0.1,
            (DECODER, "compute"): 0.05,
            (WITH_MEMORY, "parameters"): 0.12,
            (WITH_MEMORY, "compute"): 0.06,
        }
    )
    assert not any(fit.has_floor for fit in fits.values())
    for fit in fits.values():  # every document has the same loss
        assert fit.interval == pytest.approx((fit.exponent, fit.exponent))


def test_four_sizes_have_a_fit_with_a_floor_too() -> None:
    assert [fit.has_floor for fit in fit_points(_points(4))] == [False, True] * 4


def test_the_json_is_read_as_it_was_written_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    write_scaling(path, _result())
    assert read_scaling(path) == _result()
    path.write_text(path.read_text().replace("mlpmem-scaling", "mlpmem-report"))
    with pytest.raises(DamagedDataError, match="run fit_scaling again"):
        read_scaling(path)


def test_bases_that_were_not_yet_at_an_end_are_named_and_older_results_do_not_know(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    write_scaling(path, _result())
    assert bases_at_their_best(read_scaling(path)) == (
        "Bases that were at their best at their last step, so not yet at an end: 2 M."
    )
    record = json.loads(path.read_text())
    for point in record["points"]:
        del point["base_is_past_best"]
    publish_json(path, record)
    assert bases_at_their_best(read_scaling(path)) == (
        "Not recorded whether more steps might have made these bases better: 1 M, 2 M, 4 M, 8 M."
    )


def test_the_page_has_the_tables_and_says_what_was_held_equal(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    publish_scaling(page, _result())
    text = page.read_text()
    assert scaling_table(_result()) in text
    assert "Held equal: the text." in " ".join(text.split())
    assert bases_at_their_best(_result()) in " ".join(text.split())
    assert (tmp_path / "results" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    publish_scaling(page, replace(_result(), date="2026-05-06"))
    assert "2026-01-02" not in page.read_text()
