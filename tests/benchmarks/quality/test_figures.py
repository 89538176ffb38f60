"""Reports of several seeds → rows and ratios, from scores that are written as `evaluate` writes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.benchmarks.quality.figures import FIXED_ARMS, _row, epochs_used_up, read_reports
from mlpmem_ds.core.config import Flags, option
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.stage_directory import open_stage
from mlpmem_ds.core.world import World
from mlpmem_ds.formats.evaluation import DocumentSums, write_document_sums, write_evaluation
from mlpmem_ds.formats.trained_models import BaselineManifest, TrainingResult

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


@dataclass(frozen=True, kw_only=True)
class _Schedule(Flags):
    """Flags of a training."""

    output: Path = option("directory")
    epochs: float = option("passes", 2.0)
    time_budget_seconds: float | None = option("seconds", None)


def _model(root: Path, *, selected_step: int, **flags: float) -> Path:
    """As `train_baseline` leaves it after 30 steps."""
    config = _Schedule(output=root, **flags)
    directory = open_stage(root, stage="baseline", version=1, config=config, inputs={}, world=World())
    manifest = BaselineManifest(
        kind="continued",
        base={},
        training=TrainingResult(
            steps=30,
            rows_per_step=64,
            selected_step=selected_step,
            validations=({"step": selected_step, "perplexity": 20.0}, {"step": 30, "perplexity": 21.0}),
        ),
        parameters=1,
        parameters_trained=1,
        parameters_matched=None,
        rank=None,
        alpha=None,
    )
    directory.complete([], lambda: manifest)
    return root


def test_a_model_whose_best_step_is_its_last_has_used_up_its_epochs(tmp_path: Path) -> None:
    models = [
        _model(tmp_path / "ended", selected_step=30, epochs=3.0),
        _model(tmp_path / "stopped", selected_step=20),
        _model(tmp_path / "timed", selected_step=30, time_budget_seconds=9.0),
    ]
    assert epochs_used_up(models) == (3.0,)
    assert epochs_used_up(models[1:]) == ()


def test_tokens_and_seconds_are_means_over_the_seeds(tmp_path: Path) -> None:
    roots = [_write(tmp_path / str(seed), base=20.0, base_plus_memory=17.0) for seed in range(2)]
    reports = read_reports(roots, FIXED_ARMS)
    by_seed = tuple(
        {**figures, "base+memory": replace(figures["base+memory"], tokens=tokens, seconds=seconds)}
        for figures, tokens, seconds in zip(reports.by_seed, (300, 600), (60.0, 90.0), strict=True)
    )
    row = _row("base+memory", replace(reports, by_seed=by_seed), None, ())
    assert (row.tokens, row.seconds) == (450, 75.0)
