"""Part of `quality`: the reports of all seeds → rows of the tables, and the ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mlpmem_ds.benchmarks.quality.arms import (
    BANK,
    BASE,
    ENSEMBLE_GATE,
    KNN,
    KNN_INDEX,
    MODELS,
    description_of,
)
from mlpmem_ds.benchmarks.quality.bootstrap import ArmSums, Estimate, estimate
from mlpmem_ds.benchmarks.quality.plan import Plan, ReportPlace, TextName, training_job
from mlpmem_ds.benchmarks.quality.presets import Text
from mlpmem_ds.benchmarks.quality.ratios import ratios_of
from mlpmem_ds.benchmarks.quality.results import ArmRow, RatioResult, TextResult
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.manifest import CompleteStage, read_stage
from mlpmem_ds.core.run_description import flags_of_run
from mlpmem_ds.formats.corpus import num_tokens_of_splits
from mlpmem_ds.formats.evaluation import ArmFigures, read_document_sums, read_evaluation
from mlpmem_ds.formats.trained_models import BaselineManifest


@dataclass(frozen=True, kw_only=True)
class Reports:
    """The reports of one text's arms on one text, by seed, the first with the arms that no seed changes."""

    by_seed: tuple[Mapping[str, ArmFigures], ...]
    """arm → its figures, of each seed"""
    tested: ArmSums

    @property
    def arms(self) -> list[str]:
        """In the order of the reports."""
        return list(self.tested.sums)

    def figures(self, arm: str) -> list[ArmFigures]:
        """Of each seed that has the arm."""
        return [figures[arm] for figures in self.by_seed if arm in figures]

    def with_arm(self, other: Reports | None, arm: str) -> Reports:
        """The same with an arm of other reports of the same text, if there are such and they have it."""
        if other is None or arm not in other.tested.sums:
            return self
        pairs = zip(self.by_seed, other.by_seed, strict=True)
        return Reports(
            by_seed=tuple({**mine, arm: theirs[arm]} for mine, theirs in pairs),
            tested=replace(self.tested, sums={**self.tested.sums, arm: other.tested.sums[arm]}),
        )


def read_reports(roots: Sequence[Path], fixed: Sequence[str]) -> Reports:
    """The reports of the seeds 0, 1, … of the same arms.

    Args:
        roots: of the reports.
        fixed: arms that are the same in every seed: one entry is kept.

    Raises:
        DamagedDataError: a file is missing, or the reports are of different documents.
    """
    evaluations = tuple(read_evaluation(root) for root in roots)
    parts = [
        read_document_sums(root, evaluation.test_split)
        for root, evaluation in zip(roots, evaluations, strict=True)
    ]
    sums: dict[str, list[np.ndarray]] = {}
    for root, part in zip(roots, parts, strict=True):
        if not np.array_equal(part.positions_M, parts[0].positions_M):
            raise DamagedDataError(
                f"the reports {roots[0]} and {root} are of different documents: remove both and run the"
                " benchmark again, it makes them anew"
            )
        for arm, sums_M in part.sums.items():
            if arm not in fixed or arm not in sums:
                sums.setdefault(arm, []).append(sums_M)
    by_seed = tuple({arm.name: arm for arm in evaluation.arms} for evaluation in evaluations)
    return Reports(by_seed=by_seed, tested=ArmSums(positions_M=parts[0].positions_M, sums=sums))


FIXED_ARMS = (BASE, KNN, KNN_INDEX)


def text_result(
    name: TextName, text: Text, other_text: Text, plan: Plan, root: Path
) -> tuple[TextResult, list[RatioResult]]:
    """The table of one text, and its ratios."""
    own, bank = _reports_of(name, name, plan, root), _reports_of("bank", name, plan, root)
    assert own is not None
    own = own.with_arm(_reports_of(name, name, plan, root, of="ensemble"), ENSEMBLE_GATE)
    own = own.with_arm(bank, BANK)
    other_name: TextName = "general" if name == "domain" else "domain"
    other = _reports_of(name, other_name, plan, root)
    if other is not None:
        other = other.with_arm(_reports_of(name, other_name, plan, root, of="ensemble"), ENSEMBLE_GATE)
    seeds = [place.seed for place in _places(name, name, plan)]
    models = {arm: [root / training_job(name, arm, seed) for seed in seeds] for arm in MODELS}
    rows = [_row(arm, own, other, models.get(arm, ())) for arm in own.arms]
    result = TextResult(
        name=name,
        title=text.title,
        positions={split: max(0, count - 1) for split, count in _split_tokens(root, name).items()},
        documents=len(own.tested.positions_M),
        other=None if other is None else other_text.title,
        rows=tuple(rows),
    )
    return result, ratios_of(own.tested, None if other is None else other.tested, name)


def _split_tokens(root: Path, name: TextName) -> Mapping[str, int]:
    tokens = num_tokens_of_splits(root / name / "corpus")
    return {split: count for split, count in tokens.items() if count}


def _reports_of(
    trained_on: TextName | Literal["bank"],
    tested_on: TextName,
    plan: Plan,
    root: Path,
    *,
    of: Literal["arms", "ensemble"] = "arms",
) -> Reports | None:
    """Of one text's arms, its gated ensemble, or the bank, on a text, by seed; None where there are none."""
    places = _places(trained_on, tested_on, plan, of=of)
    return read_reports([root / place.name for place in places], FIXED_ARMS) if places else None


def _places(
    trained_on: TextName | Literal["bank"],
    tested_on: TextName,
    plan: Plan,
    *,
    of: Literal["arms", "ensemble"] = "arms",
) -> list[ReportPlace]:
    """Of one kind of report, by seed."""
    key = (trained_on, tested_on, of)
    return [place for place in plan.reports if (place.trained_on, place.tested_on, place.of) == key]


def epochs_used_up(models: Sequence[Path]) -> tuple[float, ...]:
    """The epochs of those outputs of `train_baseline` that were best at the last step of their schedule."""
    epochs = []
    for root in models:
        stage: CompleteStage[BaselineManifest] = read_stage(
            CompleteStage, BaselineManifest, root, flag="--output", has_files=False
        )
        training, flags = stage.manifest.training, flags_of_run(root)
        # Early stopping needs a validation after the best one, and a budget is no number of epochs.
        if training.is_past_best is False and flags.get("time_budget_seconds") is None:
            epochs.append(float(flags["epochs"]))
    return tuple(epochs)


def _row(arm: str, own: Reports, other: Reports | None, models: Sequence[Path]) -> ArmRow:
    by_seed = own.figures(arm)[: len(own.tested.sums[arm])]
    ppl = [own.tested.ppl(arm, seed) for seed in range(len(by_seed))]
    change = None if arm == BASE else change_of(arm, own.tested)
    is_on_other = arm != BASE and other is not None and arm in other.tested.sums
    other_change = change_of(arm, other.tested) if is_on_other and other is not None else None
    # A report has no time where it did not find a stage of the memory.
    seconds = [figures.seconds for figures in by_seed if figures.seconds is not None]
    tokens = [figures.tokens for figures in by_seed if figures.tokens is not None]
    return ArmRow(
        arm=arm,
        description=description_of(arm),
        seeds=len(by_seed),
        ppl=float(np.exp(np.mean(np.log(ppl)))),
        ppl_by_seed=tuple(ppl),
        change=None if change is None else change.value,
        interval=None if change is None else change.interval,
        bits_per_byte=float(np.mean([figures.bits_per_byte for figures in by_seed])),
        calibration_error=float(np.mean([figures.calibration.error for figures in by_seed])),
        lambdas=tuple(figures.lmbda for figures in by_seed if figures.lmbda is not None),
        other_change=None if other_change is None else other_change.value,
        other_interval=None if other_change is None else other_change.interval,
        parameters=by_seed[0].parameters,
        tokens=round(np.mean(tokens)) if tokens else None,
        seconds=float(np.mean(seconds)) if seconds else None,
        epochs_used_up=epochs_used_up(models),
    )


def change_of(arm: str, tested: ArmSums) -> Estimate:
    """Of an arm's perplexity against the base's."""
    return estimate(tested, lambda ppl: ppl(arm) / ppl(BASE) - 1, (BASE, arm))
