"""Part of `evaluate` and `fit_gate`: stored scores → what a gate reads of each position, and the weights that
it gives.

A gate with a history needs the whole text in its order, so this is done when every unit is there; it runs no
model. A gate that reads hidden states has them from an arm of its own (`arms/states.py`).

N positions of a stream, M memories, C confidences, F features of a gate, D and H widths of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.models.gate_features import join_confidences
from mlpmem_ds.models.gates import LearnedGate
from mlpmem_ds.models.mixture import GateInputs
from mlpmem_ds.stages.evaluation.stored_scores import StoredScores

_ROWS = 1 << 16  # whose weights are computed at once


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A text as a gate sees it."""

    log_base_N: torch.Tensor
    """float64: of the tokens that followed"""
    log_memories_NM: torch.Tensor
    confidences_NC: torch.Tensor
    """float32"""
    segments_N: torch.Tensor
    """int64: the document of the token that a position reads"""
    states: tuple[torch.Tensor, ...] = ()
    """float32: of the base [N, D], then of each memory [N, H]; empty where they were not stored"""


def evidence_of(
    base: StoredScores,
    memories: Sequence[StoredScores],
    stream: str,
    corpus: CorpusSplit,
    states: tuple[np.ndarray, ...] = (),
) -> Evidence:
    """Of one stream, from what base and memories left; all memories have confidences."""
    base_columns = base.guesses[stream][:, [1, 0]]
    memory_columns = [
        np.concatenate([memory.confidences[stream], memory.guesses[stream][:, None]], axis=1)
        for memory in memories
    ]
    values = np.stack([memory.values[stream] for memory in memories], axis=1)
    return Evidence(
        log_base_N=torch.from_numpy(base.values[stream].astype(np.float64)),
        log_memories_NM=torch.from_numpy(values.astype(np.float64)),
        confidences_NC=join_confidences(
            torch.from_numpy(base_columns), [torch.from_numpy(columns) for columns in memory_columns]
        ),
        segments_N=torch.from_numpy(corpus.documents_of(np.arange(corpus.num_positions) - 1)),
        states=tuple(map(torch.from_numpy, states)),
    )


@torch.no_grad()
def gate_features(gate: LearnedGate, evidence: Evidence) -> torch.Tensor:
    """float32 [N, F]."""
    history_NH = None
    if gate.history is not None:
        history_NH, _ = gate.history.along(
            evidence.log_base_N, evidence.log_memories_NM, segments=evidence.segments_N
        )
    inputs = GateInputs(
        confidences=evidence.confidences_NC,
        history=history_NH,
        states=dict(zip(gate.reads, evidence.states[:1], strict=False)),
        memory_states=evidence.states[1:],
    )
    return gate.features(inputs)


@torch.no_grad()
def gate_weights(gate: LearnedGate, evidence: Evidence) -> np.ndarray:
    """The memories' weights at each position, float64 [N, M]."""
    features_NF = gate_features(gate, evidence)
    weights = torch.cat([gate.weights(rows) for rows in features_NF.split(_ROWS)])
    result: np.ndarray = weights.double().numpy()
    return result
