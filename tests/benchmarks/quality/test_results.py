"""quality.json: written, read, and refused where it is of another kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.quality.plots import plot_changes
from mlpmem_ds.benchmarks.quality.results import read_result, write_result
from mlpmem_ds.core.errors import DamagedDataError

from .conftest import make_result


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_result(tmp_path / "quality.json", make_result())
    assert read_result(tmp_path / "quality.json") == make_result()


@pytest.mark.parametrize("change", [{"format": "mlpmem-report"}, {"version": 9}, {"more": 1}])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "quality.json"
    write_result(path, make_result())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedDataError, match=r"quality\.json"):
        read_result(path)


def test_the_figure_has_the_same_bytes_for_the_same_result(tmp_path: Path) -> None:
    plot_changes(make_result(), tmp_path / "one.png")
    plot_changes(make_result(), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
