"""Reports of several seeds → rows and ratios, from scores that are written as `evaluate` writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.figures import FIXED_ARMS, read_reports
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.formats.evaluation import DocumentSums, write_document_sums, write_evaluation

from ...stages.conftest import make_arm, make_evaluation

POSITIONS_M = np.array([40, 60])


def _write(root: Path, **ppl: float) -> Path:
    root.mkdir()
    arms = {name.replace("_plus_", "+"): value for name, value in ppl.items()}
    write_evaluation(root, make_evaluation(*(make_arm(name, value) for name, value in arms.items())))
    sums = {name: -np.log(value) * POSITIONS_M for name, value in arms.items()}
    write_document_sums(root, "test", DocumentSums(positions_M=POSITIONS_M, sums=sums))
    return root


def test_arms_of_all_seeds_stand_together_and_fixed_ones_once(tmp_path: Path) -> None:
    roots = [
        _write(tmp_path / "0", base=20.0, base_plus_knn_exact=18.0, base_plus_memory=17.0),
        _write(tmp_path / "1", base=20.0, base_plus_memory=16.0),
    ]
    reports = read_reports(roots, FIXED_ARMS)
    assert reports.arms == ["base", "base+knn_exact", "base+memory"]
    assert {arm: len(by_seed) for arm, by_seed in reports.tested.sums.items()} == {
        "base": 1,
        "base+knn_exact": 1,
        "base+memory": 2,
    }
    assert [reports.tested.ppl("base+memory", seed) for seed in range(2)] == pytest.approx([17, 16])
    assert [figures.ppl for figures in reports.figures("base+memory")] == [17, 16]


def test_the_bank_stands_with_the_arms_of_the_text_that_it_was_tested_on(tmp_path: Path) -> None:
    own = read_reports([_write(tmp_path / "own", base=20.0, base_plus_memory=17.0)], FIXED_ARMS)
    bank = read_reports([_write(tmp_path / "bank", base=20.0, base_plus_bank_plus_gate=16.5)], FIXED_ARMS)
    both = own.with_arm(bank, "base+bank+gate")
    assert both.arms == ["base", "base+memory", "base+bank+gate"]
    assert both.tested.ppl("base+bank+gate", 0) == pytest.approx(16.5)
    assert own.with_arm(bank, "base+other").arms == own.arms == own.with_arm(None, "base+other").arms


def test_reports_of_different_documents_are_refused(tmp_path: Path) -> None:
    roots = [_write(tmp_path / "0", base=20.0), _write(tmp_path / "1", base=20.0)]
    sums = DocumentSums(positions_M=POSITIONS_M + 1, sums={"base": -POSITIONS_M.astype(float)})
    write_document_sums(roots[1], "test", sums)
    with pytest.raises(DamagedDataError, match="different documents"):
        read_reports(roots, FIXED_ARMS)
