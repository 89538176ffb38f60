"""Part of `evaluate` and `fit_gate`: the files that an arm's units left → arrays over each stream.

N positions of a stream, T choices of an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlpmem_ds.core.array_files import read_array
from mlpmem_ds.stages.evaluation.arms.arm import Arm
from mlpmem_ds.stages.evaluation.units import Unit


@dataclass(frozen=True, kw_only=True)
class StoredScores:
    """What an arm said of all positions, by stream; see `Scores`."""

    values: Mapping[str, np.ndarray]
    """[N] or [N, T]"""
    guesses: Mapping[str, np.ndarray]
    """[N, 3], [N] or [N, T]"""
    confidences: Mapping[str, np.ndarray]
    """[N, 3]; empty where the arm has none"""


def read_stored_scores(root: Path, arm: Arm, units: Iterable[Unit]) -> StoredScores:
    """Of an arm, from all its units in their order."""
    mine = [unit for unit in units if arm in unit.arms]

    def joined(file_of: Callable[[Unit], str]) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {}
        for unit in mine:
            parts.setdefault(unit.stream, []).append(read_array(root / file_of(unit)))
        return {stream: np.concatenate(arrays) for stream, arrays in parts.items()}

    has_confidences = bool(mine) and (root / mine[0].confidence_file(arm)).is_file()
    return StoredScores(
        values=joined(lambda unit: unit.score_file(arm)),
        guesses=joined(lambda unit: unit.guess_file(arm)),
        confidences=joined(lambda unit: unit.confidence_file(arm)) if has_confidences else {},
    )
