"""What `fit_scaling` refuses before it trains anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlpmem_ds.benchmarks.scaling.config import Config
from mlpmem_ds.benchmarks.scaling.fit_scaling import run
from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.world import World


def test_a_file_as_output_and_a_page_in_no_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name a directory, such as runs/scaling"):
        run(Config(output=tmp_path / "file", preset="tiny"), World())
    with pytest.raises(UserError, match="does not exist; make it first"):
        run(Config(output=tmp_path / "run", preset="tiny", page=tmp_path / "no" / "RESULTS.md"), World())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_jobs_are_of_a_preset_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--jobs is of --preset: add that, or leave it out"):
        Config(output=tmp_path / "run", reports=(tmp_path / "report",), jobs=2).check()
