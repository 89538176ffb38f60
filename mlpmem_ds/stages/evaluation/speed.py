"""Speed of scoring against the size of the datastore: the same positions, the first quarter, half and all of
the keys.

Measured when every score is there, by the one rank that writes the report, so that no unit of this run
disturbs it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mlpmem_ds.core.blocks import Block
from mlpmem_ds.engines.hidden_states import scan_positions
from mlpmem_ds.models.backbone import CapturePoint
from mlpmem_ds.stages.evaluation.config import Config
from mlpmem_ds.stages.evaluation.inputs import Inputs
from mlpmem_ds.stages.evaluation.models import KnnArms
from mlpmem_ds.stages.evaluation.scores import memory_log_probabilities, windows_at_once
from mlpmem_ds.stages.report.summary import BASE
from mlpmem_ds.stages.retrieval.knn_scorer import KnnScorer

SHARES = (0.25, 0.5, 1.0)
_RUNS = 3


def measure_speeds(config: Config, inputs: Inputs) -> list[dict[str, Any]]:
    """`arm`, `keys` (None without a datastore), `positions`, `tokens_per_second` (median of three); []
    without a datastore."""
    store = inputs.datastore
    if store is None or not store.names or config.speed_positions is None:
        return []
    corpus = inputs.splits[config.test_split].corpus
    block = Block(0, min(config.speed_positions, corpus.num_positions))
    points: dict[str, CapturePoint] = {memory.arm: memory.point for memory in inputs.memories} | {
        "key": store.point
    }

    at_once = windows_at_once(inputs.source, corpus, config.batch_windows)

    def read() -> dict[str, torch.Tensor]:
        rows = list(scan_positions(inputs.source, corpus, block, points, batch_windows=at_once))
        return {name: torch.cat([batch.states[name] for batch in rows]) for name in points}

    states, values_n = read(), corpus.values(*block)
    base_seconds = _median_seconds(read)
    found: list[tuple[str, int | None, float]] = [(BASE, None, 0.0)]
    for memory in inputs.memories:
        seconds = _median_seconds(
            partial(memory_log_probabilities, memory.memory, states[memory.arm], values_n[:, None])
        )
        found.append((memory.arm, None, seconds))
    for num_keys in _sizes(store):
        for arm in store.names:
            scorer = store.scorer(arm, num_keys)
            scorer.prepare()
            seconds = _median_seconds(partial(_score, scorer, states["key"], values_n))
            found.append((arm, num_keys, seconds))
    return [
        {
            "arm": arm,
            "keys": keys,
            "positions": block.size,
            "tokens_per_second": block.size / (base_seconds + seconds),
        }
        for arm, keys, seconds in found
    ]


def _sizes(store: KnnArms) -> list[int]:
    whole = store.keys.num_positions
    return sorted({max(min(store.k, whole), int(whole * share)) for share in SHARES})


def _score(scorer: KnnScorer, states_nD: torch.Tensor, values_n: Any) -> None:
    scorer.log_probabilities(scorer.neighbours(states_nD.numpy()), values_n)


def _median_seconds(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
