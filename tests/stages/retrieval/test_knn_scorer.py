"""The kNN language model against plain loops: it weighs as the targets do, of any kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlpmem_ds.formats.keys import open_keys
from mlpmem_ds.maths.weighting import Kind, Weighting
from mlpmem_ds.stages.retrieval.knn_scorer import NEIGHBOUR_DIVISORS, TEMPERATURE_FACTORS, KnnScorer
from mlpmem_ds.stages.retrieval.neighbour_search import open_search
from mlpmem_ds.stages.targets.teacher import Teacher

NUM_KEYS, DIM, VOCAB_SIZE, SCALE, K = 203, 6, 12, 0.5, 16


@pytest.fixture(scope="module")
def keys(make_keys: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)
    codes = generator.integers(-6, 7, size=(NUM_KEYS, DIM)).astype(np.int8)
    tokens = generator.integers(0, VOCAB_SIZE, NUM_KEYS)
    root = tmp_path_factory.mktemp("keys") / "keys"
    return make_keys(root, codes, tokens, vocab_size=VOCAB_SIZE, scale=SCALE)


@pytest.mark.parametrize("kind", ["softmax", "inverse-distance"])
def test_scores_equal_loops_and_the_targets_of_the_same_weighting(keys: Path, kind: Kind) -> None:
    stored = open_keys(keys)
    codes, values = stored.read("keys").astype(int), stored.read("values")
    weighting = Weighting(kind=kind, temperature=4.0)
    search = open_search(stored, how="exact")
    scorer = KnnScorer(keys=stored, search=search, k=K, weighting=weighting)
    assert [choice.temperature for _, choice in scorer.choices[: len(TEMPERATURE_FACTORS)]] == [
        4.0 * f for f in TEMPERATURE_FACTORS
    ]
    assert [count for count, _ in scorer.choices[:: len(TEMPERATURE_FACTORS)]] == [
        K // divisor for divisor in NEIGHBOUR_DIVISORS
    ]
    teacher = Teacher(keys=stored, search=search, k=K)
    positions = np.arange(0, NUM_KEYS, 9)
    neighbours = teacher.find(positions).unpack()
    tokens = values[positions].astype(np.int64)
    scores = scorer.log_probabilities(neighbours, tokens)
    rows = teacher.whole_rows(neighbours, weighting)
    for row, (position, token) in enumerate(zip(positions.tolist(), tokens.tolist(), strict=True)):
        squared = ((codes - codes[position]) ** 2).sum(1) * SCALE**2
        others = [key for key in range(NUM_KEYS) if key != position]
        nearest = sorted(others, key=lambda key: (squared[key], key))
        for column, (count, choice) in enumerate(scorer.choices):
            excess = [(squared[key] - squared[nearest[0]]) / choice.temperature for key in nearest[:count]]
            kernel = [math.exp(-e) if kind == "softmax" else 1 / (1 + e) for e in excess]
            weight = sum(w for key, w in zip(nearest, kernel, strict=False) if values[key] == token)
            assert np.exp(scores[row, column]) == pytest.approx(weight / sum(kernel), rel=1e-5, abs=1e-12)
        entries = slice(rows.offsets[row], rows.offsets[row + 1])
        target = dict(zip(rows.ids[entries].tolist(), rows.probabilities[entries].tolist(), strict=True))
        assert np.exp(scores[row, TEMPERATURE_FACTORS.index(1.0)]) == pytest.approx(
            target.get(token, 0.0), rel=1e-5, abs=1e-12
        )
