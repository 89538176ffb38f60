"""Part of `fit_gate`: stored scores → rows of each text → the fitted gate, and what it is worth on each text.

N positions, M memories, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlpmem_ds.core.hashing import hash_fraction
from mlpmem_ds.formats.gates import GateText
from mlpmem_ds.maths.scores import perplexity
from mlpmem_ds.models.gate_fit import Fit, FitSettings, GateRows, best_weights, fit_gate
from mlpmem_ds.models.gates import ConfidencesGate, HistoryGate, LearnedGate, RouterGate
from mlpmem_ds.stages.evaluation.arms.mixed import figures_of_weights
from mlpmem_ds.stages.evaluation.evidence import Evidence, evidence_of, gate_features
from mlpmem_ds.stages.evaluation.splits import Split
from mlpmem_ds.stages.evaluation.stored_scores import StoredScores, read_stored_scores
from mlpmem_ds.stages.evaluation.units import Unit
from mlpmem_ds.stages.gating.config import Config
from mlpmem_ds.stages.gating.inputs import Inputs, Text

_logger = logging.getLogger(__name__)

_MIN_SHARE = 0.5  # of the positions that either part should have; with fewer a document is cut


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """A text's scored positions in two parts."""

    text: Text
    fitted: GateRows
    stopping: GateRows


@dataclass(frozen=True, kw_only=True)
class FittedTexts:
    """A gate, how its fit went, the best fixed weights of all texts together, and each text's figures."""

    gate: LearnedGate
    fit: Fit
    fixed: tuple[float, ...]
    texts: tuple[GateText, ...]


def fit_to_texts(config: Config, inputs: Inputs, units: Mapping[str, Unit], root: Path) -> FittedTexts:
    """Fit to the scores that the units left in `root`. One thread: the same bytes on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        gate = make_gate(config, inputs)
        rows = _rows_of_texts(config, inputs, gate, units, root)
        settings = FitSettings(
            learning_rate=config.learning_rate,
            max_epochs=config.max_epochs,
            patience=config.patience,
            batch_positions=config.batch_positions,
            seed=config.seed,
        )
        fitted = GateRows.joined([part.fitted for part in rows])
        fit = fit_gate(gate, fitted, GateRows.joined([part.stopping for part in rows]), settings)
        fixed = best_weights(fitted)
        return FittedTexts(
            gate=gate,
            fit=fit,
            fixed=fixed,
            texts=tuple(describe_text(part, gate, fixed, config.tuning_split) for part in rows),
        )
    finally:
        torch.set_num_threads(threads)


def make_gate(config: Config, inputs: Inputs) -> LearnedGate:
    """The gate of `--kind`, untrained."""
    lmbdas = [1 / (1 + len(inputs.members))] * len(inputs.members)
    if config.kind == "router":
        assert inputs.states is not None
        base_size, *memory_sizes = inputs.states.sizes_of_states()
        return RouterGate(
            lmbdas=lmbdas, base_size=base_size, memory_sizes=memory_sizes, hidden=config.hidden or 128
        )
    kind = HistoryGate if config.kind == "history" else ConfidencesGate
    return kind(lmbdas=lmbdas, hidden=config.hidden or 32)


def _rows_of_texts(
    config: Config, inputs: Inputs, gate: LearnedGate, units: Mapping[str, Unit], root: Path
) -> list[TextRows]:
    base, *members = (read_stored_scores(root, arm, units.values()) for arm in (inputs.base, *inputs.members))
    states = None if inputs.states is None else read_stored_scores(root, inputs.states, units.values())
    rows = []
    for stream, text in inputs.texts.items():
        parts = () if inputs.states is None else _states_of(states, stream, inputs.states.sizes_of_states())
        evidence = evidence_of(base, members, stream, text.split.corpus, parts)
        is_stopping_N = choose_stopping(text.split, config.stopping_fraction)
        rows.append(_rows_of_text(text, gate, evidence, is_stopping_N))
    return rows


def _states_of(states: StoredScores | None, stream: str, sizes: list[int]) -> tuple[np.ndarray, ...]:
    assert states is not None
    return tuple(np.split(states.values[stream], np.cumsum(sizes)[:-1], axis=1))


def _rows_of_text(text: Text, gate: LearnedGate, evidence: Evidence, is_stopping_N: np.ndarray) -> TextRows:
    features_NF = gate_features(gate, evidence)
    positions = text.split.scored_positions
    fitted, stopping = (
        _take(evidence, features_NF, torch.from_numpy(positions[chosen]))
        for chosen in (~is_stopping_N, is_stopping_N)
    )
    return TextRows(text=text, fitted=fitted, stopping=stopping)


def _take(evidence: Evidence, features_NF: torch.Tensor, positions: torch.Tensor) -> GateRows:
    return GateRows(
        features_NF=features_NF[positions],
        log_base_N=evidence.log_base_N[positions],
        log_memories_NM=evidence.log_memories_NM[positions],
        shares_N=torch.full((len(positions),), 1 / len(positions), dtype=torch.float64),
    )


def choose_stopping(split: Split, fraction: float) -> np.ndarray:
    """bool over the split's scored positions: those that choose when to stop, whole documents of about this
    share of the positions, drawn by their names.

    Where documents are too few or too long for that, the text is cut at a position: its end chooses. Either
    part has a position.
    """
    corpus = split.corpus
    positions = split.scored_positions
    document_of_N = corpus.documents_of(positions)
    sizes = np.bincount(document_of_N, minlength=len(corpus.documents))
    names = [str(document["name"]) for document in corpus.documents]
    is_stopping = np.zeros(len(names), dtype=bool)
    taken, total = [0, 0], 0
    for number in sorted(range(len(names)), key=lambda number: hash_fraction(f"gate:{names[number]}")):
        total += sizes[number]
        is_stopping[number] = taken[1] + sizes[number] / 2 <= fraction * total
        taken[int(is_stopping[number])] += sizes[number]
    if min(taken[1] / fraction, taken[0] / (1 - fraction)) >= _MIN_SHARE * len(positions):
        result: np.ndarray = is_stopping[document_of_N]
        return result
    _logger.warning(
        "the %d documents of the %s split of %s do not part well: the end of its text chooses when to stop",
        int((sizes > 0).sum()),
        split.name,
        corpus.root,
    )
    first = min(max(round((1 - fraction) * len(positions)), 1), len(positions) - 1)
    cut: np.ndarray = np.arange(len(positions)) >= first
    return cut


@torch.no_grad()
def describe_text(part: TextRows, gate: LearnedGate, fixed: tuple[float, ...], split: str) -> GateText:
    """What gate and fixed weights are worth on the positions that chose when to stop."""
    rows, corpus = part.stopping, part.text.split.corpus
    weights_NM = gate.weights(rows.features_NF)
    own = best_weights(rows)
    return GateText(
        corpus=corpus.sha256,
        name=part.text.root.name,
        split=split,
        part=part.text.part,
        documents=len(np.unique(corpus.documents_of(part.text.split.scored_positions))),
        positions=part.text.split.num_positions,
        stopping_positions=len(rows.shares_N),
        base_ppl=perplexity(rows.log_base_N.numpy()),
        memory_ppl=tuple(perplexity(column.numpy()) for column in rows.log_memories_NM.unbind(-1)),
        fixed_ppl=float(rows.loss(torch.tensor(fixed, dtype=torch.float64)).exp()),
        own_fixed_ppl=float(rows.loss(torch.tensor(own, dtype=torch.float64)).exp()),
        own_fixed=own,
        gate_ppl=float(rows.loss(weights_NM).exp()),
        weights=figures_of_weights(weights_NM.double().numpy()),
    )
