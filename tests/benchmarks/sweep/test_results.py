"""A made-up result → JSON, figure, table, and its section of the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.quality.page import publish_sweep, render_page
from mlpmem_ds.benchmarks.sweep.results import plot_sweep, read_sweep, sweep_table, write_sweep
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json

from .conftest import make_result


def test_an_axis_has_the_settings_that_differ_in_it_alone() -> None:
    result = make_result()
    assert [setting.epochs for setting in result.along("epochs")] == [1, 2]
    assert [setting.base_epochs for setting in result.along("base_epochs")] == [3, 9]


def test_the_json_is_read_as_it_was_written_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    write_sweep(path, make_result())
    assert read_sweep(path) == make_result()
    path.write_text(path.read_text().replace("mlpmem-sweep", "mlpmem-report"))
    with pytest.raises(DamagedDataError, match="run bench sweep again"):
        read_sweep(path)


def test_the_page_says_of_an_older_result_that_its_sizes_were_tested_on_different_texts(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sweep.json"
    write_sweep(path, make_result())
    page = " ".join(render_page([], None, read_sweep(path)).split())
    assert "tuning and test text are the same in all lines" in page
    record = json.loads(path.read_text())
    del record["has_one_test_text"]
    publish_json(path, record)
    page = " ".join(render_page([], None, read_sweep(path)).split())
    assert "lines of different MB are tested on different texts" in page


def test_the_best_arm_of_a_line_is_bold() -> None:
    lines = sweep_table(make_result()).splitlines()
    assert lines[2:] == [
        "| 3 | 0.5 (100 k) | 1 | 20.0 | −10.0 % | **−20.0 %** |",
        "| 3 | 0.5 (100 k) | 2 | 20.0 | **−30.0 %** | −20.0 % |",
        "| 9 | 0.5 (100 k) | 1 | 20.0 | −15.0 % | **−20.0 %** |",
    ]


def test_the_same_result_gives_the_same_figure(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_sweep(make_result(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_page_has_the_table_and_the_figure(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    publish_sweep(page, make_result())
    text = page.read_text()
    assert sweep_table(make_result()) in text and "results/sweep.png" in text
    assert (tmp_path / "results" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    publish_sweep(page, make_result())
    assert page.read_text() == text
