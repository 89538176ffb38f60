"""Part of `extract_keys`: how far the targets of stored keys are from those of the raw keys, measured on a
sample.

Sampled queries are compared with every candidate twice: by the raw hidden states, which the base computes
again and which are never stored, and by the stored keys (and by int8 codes of other sizes, where asked). The
candidates stream past, a bounded number at a time, with each query's k nearest so far. Candidates are all
positions, or whole windows drawn at random where there are more than the bound: neighbours are then farther
apart than in the whole datastore, and the report says how many there were.

Q queries, M candidates, m of a chunk, D width of the base, K neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mlpmem_ds.core.blocks import Window, split_blocks
from mlpmem_ds.core.errors import DamagedDataError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.core.hashing import shuffled
from mlpmem_ds.core.log import Progress, log_for_all
from mlpmem_ds.core.world import World
from mlpmem_ds.engines.hidden_states import StateSource
from mlpmem_ds.formats.corpus import CorpusSplit
from mlpmem_ds.formats.keys import Codec, Keys
from mlpmem_ds.maths.neighbours import Exclusion, Neighbours, PackedNeighbours, merge_neighbours
from mlpmem_ds.maths.target_distance import neighbour_variation, recall
from mlpmem_ds.maths.weighting import fit_weighting
from mlpmem_ds.models.capture_point import CapturePoint
from mlpmem_ds.stages.keys.codec import fit_sample, read_sample, read_windows, sample_windows
from mlpmem_ds.stages.retrieval.exact_search import ExactSearch
from mlpmem_ds.stages.retrieval.neighbour_search import squared_key_distances

_logger = logging.getLogger(__name__)

NAME, FORMAT, VERSION = "audit.json", "mlpmem-key-audit", 1
PERPLEXITIES = {"soft": 300.0, "sharp": 30.0}
_K = 1024
_CHUNK = 32768  # candidates in memory: 32768 · D · 4 bytes
_ROWS_AT_ONCE = 1024  # queries that are searched, merged and compared at once
_QUERY_SPREAD = 32  # the windows that the queries are drawn from hold this many positions a query
_WINDOWS_SEED, _QUERIES_SEED = 5, 6


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """queries, candidates: how many positions; dims: other sizes of int8 codes to measure; the rest as the
    keys were made."""

    queries: int
    candidates: int
    dims: tuple[int, ...]
    fit_positions: int
    seed: int
    batch_windows: int
    device: torch.device
    """where keys are compared"""


@dataclass(kw_only=True)
class _Arm:
    """One way to store a key: what it makes of raw states (None: read the stored keys), and the k nearest so
    far."""

    name: str
    dim: int
    bytes: int
    energy_kept: float
    scale: float
    encode: Callable[[np.ndarray], np.ndarray] | None
    queries: np.ndarray = field(default_factory=lambda: np.empty(0))
    best: PackedNeighbours | None = None

    @property
    def nearest(self) -> Neighbours:
        assert self.best is not None
        return self.best.rows(slice(None))


def run_audit(
    source: StateSource,
    corpus: CorpusSplit,
    keys: Keys,
    point: CapturePoint,
    settings: AuditSettings,
    world: World,
) -> dict[str, Any]:
    """Write `audit.json` into a complete key directory and log its table; an equal audit that is there is not
    repeated."""
    settings_json = {
        "queries": settings.queries,
        "candidates": settings.candidates,
        "dims": list(settings.dims),
        "fit_positions": settings.fit_positions,
        "seed": settings.seed,
    }
    audit = _read_earlier(keys)
    if audit is None or audit["settings"] != settings_json:
        audit = {
            "format": FORMAT,
            "version": VERSION,
            "keys": keys.sha256,
            "settings": settings_json,
            **measure(source, corpus, keys, point, settings, world),
        }
        publish_json(keys.root / NAME, audit, seal=True)
    for line in table(audit):
        log_for_all(_logger, world, "%s", line)
    return audit


def measure(
    source: StateSource,
    corpus: CorpusSplit,
    keys: Keys,
    point: CapturePoint,
    settings: AuditSettings,
    world: World,
) -> dict[str, Any]:
    """The audit's figures; see `audit.json` in formats/README.md."""
    windows = sorted(sample_windows(corpus, settings.candidates, _WINDOWS_SEED, settings.seed))
    query_positions, query_states = _read_queries(source, corpus, point, settings)
    # Less the mean, distances are the same, and their float32 rounding is smaller.
    offset_D = query_states.mean(axis=0)
    reference = _Arm(
        name="raw",
        dim=query_states.shape[1],
        bytes=0,
        energy_kept=1.0,
        scale=1.0,
        encode=lambda states: states - offset_D,
    )
    arms = [reference, *_arms(source, corpus, keys, point, settings)]
    for arm in arms:
        arm.queries = keys.gather("keys", query_positions) if arm.encode is None else arm.encode(query_states)
    candidates = np.concatenate([np.arange(window.start, window.stop) for window in windows])
    query_rows = np.searchsorted(candidates, query_positions)
    k = min(_K, len(candidates) - 1)
    progress = Progress(len(candidates), label="audit", unit="candidates", world=world)
    for first, positions_m, states_mD in _chunks(source, corpus, windows, point, settings.batch_windows):
        for arm in arms:
            vectors = keys.gather("keys", positions_m) if arm.encode is None else arm.encode(states_mD)
            _keep_nearest(arm, vectors, first, query_rows, k, settings.device)
        progress.advance(len(positions_m))
    progress.close()
    true_weights = {name: _weights(reference, name) for name in PERPLEXITIES}
    values_M = np.concatenate([corpus.values(window.start, window.stop) for window in windows])
    return {
        "num_queries": len(query_positions),
        "num_candidates": len(candidates),
        "candidate_share": len(candidates) / keys.num_positions,
        "k": k,
        "perplexities": PERPLEXITIES,
        "arms": [_compare(arm, reference, true_weights, values_M) for arm in arms[1:]],
    }


def table(audit: Mapping[str, Any]) -> Iterator[str]:
    """The audit in lines of text."""
    yield (
        f"audit: {audit['num_queries']:,} queries, {audit['num_candidates']:,} candidates "
        f"({audit['candidate_share']:.1%} of the corpus), k = {audit['k']:,}; against raw keys:"
    )
    yield f"  {'keys':<20}{'bytes':>8}{'energy':>9}{'recall':>9}{'TV soft':>10}{'TV sharp':>10}"
    for arm in audit["arms"]:
        distances = [arm["total_variation"][name] for name in PERPLEXITIES]
        shown = "".join(
            f"{'-' if distance is None else format(distance, '.4f'):>10}" for distance in distances
        )
        yield f"  {arm['name']:<20}{arm['bytes']:>8}{arm['energy_kept']:>9.4f}{arm['recall']:>9.4f}{shown}"


def _read_earlier(keys: Keys) -> dict[str, Any] | None:
    """The audit of exactly these keys that is there, or None."""
    try:
        audit = read_json(keys.root / NAME)
        is_same = (audit["format"], audit["version"], audit["keys"]) == (FORMAT, VERSION, keys.sha256)
    except (DamagedDataError, KeyError, TypeError):
        return None
    return audit if is_same else None


def _read_queries(
    source: StateSource, corpus: CorpusSplit, point: CapturePoint, settings: AuditSettings
) -> tuple[np.ndarray, np.ndarray]:
    """Positions [Q], ascending, and raw states [Q, D] of the queries: drawn from the first of the candidates'
    windows."""
    num_candidates = min(_QUERY_SPREAD * settings.queries, settings.candidates)
    windows = sorted(sample_windows(corpus, num_candidates, _WINDOWS_SEED, settings.seed))
    available = np.concatenate([np.arange(window.start, window.stop) for window in windows])
    drawn = np.sort(available[shuffled(len(available), _QUERIES_SEED, settings.seed)[: settings.queries]])
    parts = [
        states_nD[np.isin(positions_n, drawn)]
        for positions_n, states_nD in read_windows(
            source, corpus, windows, point, batch_windows=settings.batch_windows
        )
    ]
    return drawn, np.concatenate(parts)


def _arms(
    source: StateSource, corpus: CorpusSplit, keys: Keys, point: CapturePoint, settings: AuditSettings
) -> Iterator[_Arm]:
    """The stored keys, and int8 codes of the other sizes asked for, fitted as the stored ones are."""
    name = f"stored {'int8' if keys.codec == 'int8' else keys.raw_dtype} {keys.dim}"
    num_bytes = keys.dim * (1 if keys.codec == "int8" else 2)
    yield _Arm(
        name=name,
        dim=keys.dim,
        bytes=num_bytes,
        energy_kept=keys.manifest.codec.energy_kept,
        scale=keys.scale,
        encode=None,
    )
    if not settings.dims:
        return
    states_ND = read_sample(source, corpus, point, settings.fit_positions, settings.seed)
    for dim in settings.dims:
        fitted = fit_sample(states_ND, dim, settings.seed)
        codec = Codec(
            mean_D=fitted.mean_D.astype(np.float32),
            rotation_DE=fitted.rotation_DE.astype(np.float32),
            scale=fitted.scale,
            massive=fitted.massive,
        )
        yield _Arm(
            name=f"int8 {dim}",
            dim=dim,
            bytes=dim,
            energy_kept=fitted.energy_kept,
            scale=fitted.scale,
            encode=codec.encode,
        )


def _chunks(
    source: StateSource,
    corpus: CorpusSplit,
    windows: Sequence[Window],
    point: CapturePoint,
    batch_windows: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the first candidate, positions [m], raw states [m, D]), about `_CHUNK` candidates at a
    time."""
    first, positions, states, held = 0, [], [], 0
    for positions_n, states_nD in read_windows(source, corpus, windows, point, batch_windows=batch_windows):
        positions.append(positions_n)
        states.append(states_nD)
        held += len(positions_n)
        if held >= _CHUNK:
            yield first, np.concatenate(positions), np.concatenate(states)
            first, positions, states, held = first + held, [], [], 0
    if held:
        yield first, np.concatenate(positions), np.concatenate(states)


def _row_blocks(num_queries: int) -> list[slice]:
    return [slice(*block) for block in split_blocks(num_queries, _ROWS_AT_ONCE)]


def _keep_nearest(
    arm: _Arm, vectors_mE: np.ndarray, first: int, query_rows: np.ndarray, k: int, device: torch.device
) -> None:
    """Let a chunk of candidates, numbered from `first`, into each query's k nearest so far; never the query
    itself."""
    parts, search = [], ExactSearch(vectors_mE, device)
    for rows in _row_blocks(len(query_rows)):
        exclusion = Exclusion(query_ids_Q=query_rows[rows] - first)
        found = search.search(arm.queries[rows], k, exclusion).shifted(first)
        if arm.best is None:
            parts.append(found)
        else:
            best = replace(found, packed_QK=arm.best.packed_QK[rows])
            arm.best.packed_QK[rows] = merge_neighbours([best, found]).packed_QK
    if arm.best is None:
        arm.best = replace(parts[0], packed_QK=np.concatenate([part.packed_QK for part in parts]))


def _compare(
    arm: _Arm, reference: _Arm, true_weights: Mapping[str, np.ndarray | None], values_M: np.ndarray
) -> dict[str, Any]:
    """One row of the report."""
    found_QK, true_QK = arm.nearest.ids_QK, reference.nearest.ids_QK
    blocks = _row_blocks(len(found_QK))
    variations: dict[str, float | None] = {}
    for name, true in true_weights.items():
        weights = None if true is None else _weights(arm, name)
        variations[name] = None
        if true is not None and weights is not None:
            parts = [
                neighbour_variation(
                    true[rows], values_M[true_QK[rows]], weights[rows], values_M[found_QK[rows]]
                )
                for rows in blocks
            ]
            variations[name] = float(np.concatenate(parts).mean())
    recalls = [recall(found_QK[rows], true_QK[rows], true_QK.shape[1]) for rows in blocks]
    return {
        "name": arm.name,
        "dim": arm.dim,
        "bytes": arm.bytes,
        "energy_kept": arm.energy_kept,
        "recall": float(np.concatenate(recalls).mean()),
        "total_variation": variations,
    }


def _weights(arm: _Arm, temperature: str) -> np.ndarray | None:
    """Its neighbours' weights at the temperature where they have the requested perplexity; None where none
    has."""
    squared_QK, valid_QK = squared_key_distances(arm.nearest, arm.scale)
    try:
        weighting = fit_weighting("softmax", squared_QK, valid_QK, PERPLEXITIES[temperature])
    except ValueError as error:
        _logger.warning("audit, %s keys, %s temperature: %s", arm.name, temperature, error)
        return None
    return weighting.weights(squared_QK, valid_QK)
