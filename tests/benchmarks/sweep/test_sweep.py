"""The sweep runs each base once and each setting once, and publishes what its reports say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.bootstrap import ArmSums
from mlpmem_ds.benchmarks.quality.figures import Reports
from mlpmem_ds.benchmarks.quality.jobs import Job
from mlpmem_ds.benchmarks.sweep import sweep
from mlpmem_ds.benchmarks.sweep.results import read_sweep
from mlpmem_ds.benchmarks.sweep.settings import PRESET, SWEEP
from mlpmem_ds.benchmarks.sweep.sweep import Config, run_sweep
from mlpmem_ds.core.errors import UserError

POSITIONS_M = np.array([100.0, 50.0])


def _reports(roots: Sequence[Path], fixed: Sequence[str]) -> Reports:
    """Of a base of perplexity 10 and a memory that makes it 9 and 8."""
    sums = {
        "base": [-POSITIONS_M * np.log(10)],
        "base+knn_ivfpq": [-POSITIONS_M * np.log(9.5)],
        "base+memory": [-POSITIONS_M * np.log(ppl) for ppl in (9, 8)],
    }
    return Reports(by_seed=(), tested=ArmSums(positions_M=POSITIONS_M, sums=sums))


def test_every_setting_is_run_and_what_its_reports_say_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[Path, list[str]]] = []

    class Runner:
        def __init__(self, root: Path) -> None:
            self.root = root

        def run(self, jobs: Sequence[Job]) -> None:
            ran.append((self.root, [job.words[0] for job in jobs]))

    monkeypatch.setattr(sweep, "runner_of", lambda root, jobs: Runner(root))
    monkeypatch.setattr(sweep, "read_reports", _reports)
    monkeypatch.setattr(sweep, "num_tokens_of_splits", lambda root: {"train": 101})
    page = tmp_path / "RESULTS.md"
    result = run_sweep(PRESET, SWEEP, Config(output=tmp_path / "run", seeds=2, page=page))
    settings = [root for root, words in ran if "train" in words]
    assert settings == [tmp_path / "run" / setting.name for setting in SWEEP.settings()]
    bases = {root.name for root, words in ran if "train-base" in words}
    assert bases == {"base-2", "base-6", "base-20"}
    assert read_sweep(tmp_path / "run" / "sweep.json") == result
    assert result.has_one_test_text
    first = result.settings[0]
    assert (first.base_ppl, first.positions, {*first.arms}) == (pytest.approx(10), 100, {"base+memory"})
    assert first.arms["base+memory"].by_seed == pytest.approx((-0.1, -0.2))
    assert "sweep.png" in page.read_text()


def test_a_file_as_output_and_a_page_in_no_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: name a directory"):
        run_sweep(PRESET, SWEEP, Config(output=tmp_path / "file"))
    with pytest.raises(UserError, match="does not exist; make it first"):
        run_sweep(PRESET, SWEEP, Config(output=tmp_path / "run", page=tmp_path / "no" / "RESULTS.md"))
