"""Part of `evaluate`: what the memories left → the scores of arms that weigh them anew, position by position.

N positions of a stream or split, M memories.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.core.unit_records import recorded_files
from mlpmem_ds.models.gate_fit import GateRows, best_weights
from mlpmem_ds.models.mixture_scores import pooled_scores
from mlpmem_ds.stages.evaluation.arms.mixed import MixedArm, figures_of_weights
from mlpmem_ds.stages.evaluation.evidence import evidence_of, gate_weights
from mlpmem_ds.stages.evaluation.splits import Split
from mlpmem_ds.stages.evaluation.stored_scores import StoredScores
from mlpmem_ds.stages.evaluation.units import Unit
from mlpmem_ds.stages.report.summary import GivenWeights


@dataclass(frozen=True, kw_only=True)
class MixedScores:
    """Scores [N] and guesses [N] of the memories as one, by split, and its given weights."""

    scores: Mapping[str, np.ndarray]
    guesses: Mapping[str, np.ndarray]
    weights: GivenWeights


def refuse_scores_without_confidences(
    output: Path, mixed: Iterable[MixedArm], units: Mapping[str, Unit]
) -> None:
    """Before a report is continued: its units are not made again for a gate, so that they must have left what
    it reads. Those of versions before a gate could weigh such an arm have not.

    Args:
        output: the report directory, which need not exist.
        mixed: the arms that are made of others.
        units: all, by name, in the report's order.

    Raises:
        UserError: a complete unit has no confidences of an arm that a gate weighs.
    """
    weighed = [
        member for arm in mixed if arm.gate is not None and arm.states is None for member in arm.members
    ]
    for name, files in recorded_files(output, list(units)) if weighed else ():
        unit = units[name]
        for member in weighed:
            if member in unit.arms and unit.confidence_file(member) not in files:
                raise UserError(
                    f"--output {output} holds scores of {member.name} without the confidences that --gate"
                    " reads: an earlier version of this program wrote them. Choose another --output, or"
                    " remove it to start anew"
                )


def mix(
    arm: MixedArm,
    stored: Mapping[str, StoredScores],
    base: StoredScores,
    splits: Mapping[str, Split],
    *,
    tuning: str,
    given: Mapping[str, float] | None = None,
) -> MixedScores:
    """An arm's scores.

    Args:
        arm: whose members are in `stored`, as is the arm that scores its states.
        stored, base: what the units left.
        splits: by name.
        tuning: the split on which fixed weights are chosen.
        given: the fixed weights of another report, by their names; None: they are chosen.
    """
    members = [stored[member.name] for member in arm.members]
    fixed: dict[str, float] | None = None
    if arm.gate is None:
        names = arm.names_of_weights
        if given is None:
            fixed = dict(zip(names, _best_fixed(base, members, splits[tuning]), strict=True))
        else:
            fixed = {name: given[name] for name in names}
    streams: dict[str, np.ndarray] = {}
    scores, guesses, lambdas, figures = {}, {}, {}, {}
    for name, split in splits.items():
        stream = split.corpus.name
        if stream not in streams:
            streams[stream] = _weights_of_stream(arm, stored, base, members, split, fixed)
        weights_NM = split.take(streams[stream])
        values_NM = np.stack([split.take(member.values[stream]) for member in members], axis=1)
        guesses_NM = np.stack([split.take(member.guesses[stream]) for member in members], axis=1)
        scores[name], lambdas[name] = pooled_scores(values_NM, weights_NM)
        guesses[name], _ = pooled_scores(guesses_NM, weights_NM)
        figures[name] = figures_of_weights(weights_NM)
    return MixedScores(
        scores=scores,
        guesses=guesses,
        weights=GivenWeights(lambdas=lambdas, figures=figures, chosen=fixed or {}),
    )


def _best_fixed(base: StoredScores, members: list[StoredScores], tuning: Split) -> tuple[float, ...]:
    stream = tuning.corpus.name
    log_base_N = torch.from_numpy(tuning.take(base.values[stream]).astype(np.float64))
    columns = [tuning.take(member.values[stream]).astype(np.float64) for member in members]
    return best_weights(
        GateRows(
            features_NF=torch.empty(len(log_base_N), 0),
            log_base_N=log_base_N,
            log_memories_NM=torch.from_numpy(np.stack(columns, axis=1)),
            shares_N=torch.full((len(log_base_N),), 1 / len(log_base_N), dtype=torch.float64),
        )
    )


def _weights_of_stream(
    arm: MixedArm,
    stored: Mapping[str, StoredScores],
    base: StoredScores,
    members: list[StoredScores],
    split: Split,
    fixed: Mapping[str, float] | None,
) -> np.ndarray:
    """float64 [N, M], of all positions of the split's stream."""
    stream, corpus = split.corpus.name, split.corpus
    if fixed is not None:
        return np.tile(np.array(list(fixed.values())), (corpus.num_positions, 1))
    assert arm.gate is not None
    if arm.states is not None:
        return stored[arm.states.name].values[stream].astype(np.float64)
    return gate_weights(arm.gate, evidence_of(base, members, stream, corpus))
