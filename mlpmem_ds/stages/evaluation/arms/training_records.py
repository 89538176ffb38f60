"""What `train_base` or `train_baseline` recorded of a language model: the text that it read, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlpmem_ds.core.manifest import CompleteStage, format_of, read_stage
from mlpmem_ds.formats.trained_models import BaselineManifest, BaseManifest


def tokens_of_training(root: Path, flag: str) -> int | None:
    """Tokens of all steps; None for a model from elsewhere. `flag`: how the user named it, for messages."""
    stage = _read_training(root, flag)
    if stage is None:
        return None
    training = stage.manifest.training
    return int(training.steps * training.rows_per_step)


def texts_of_training(root: Path, flag: str) -> tuple[tuple[str, str], ...]:
    """What was read, as `Arm.trained_on`; () for a model from elsewhere. `flag` as above."""
    stage = _read_training(root, flag)
    return () if stage is None else ((stage.inputs["corpus"], "train"),)


def _read_training(root: Path, flag: str) -> CompleteStage[Any] | None:
    for manifest in (BaseManifest, BaselineManifest):
        if format_of(root) == manifest.FORMAT:
            # What is read of the model has its fingerprint; here its record alone counts.
            stage: CompleteStage[Any] = read_stage(CompleteStage, manifest, root, flag=flag, has_files=False)
            return stage
    return None
