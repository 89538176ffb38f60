from __future__ import annotations

import numpy as np
import pytest

from mlpmem_ds.maths import similar_signatures
from mlpmem_ds.maths.similar_signatures import repeated_by, rows_of_band, similar_pairs


def planted(num: int, share: float, *, seed: int = 0) -> np.ndarray:
    """`num` unrelated signatures of 128 bytes and, after them, a copy of each that keeps this share."""
    random = np.random.default_rng(seed)
    originals_NP = random.integers(0, 256, (num, 128), dtype=np.uint8)
    others_NP = random.integers(0, 256, (num, 128), dtype=np.uint8)
    is_kept_NP = random.random((num, 128)) < share
    return np.concatenate([originals_NP, np.where(is_kept_NP, originals_NP, others_NP)])


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_a_band_finds_what_is_at_the_threshold(threshold: float) -> None:
    rows = rows_of_band(threshold, 128)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99 or rows == 1
    assert 1 <= rows <= 8


def test_pairs_are_those_of_all_comparisons() -> None:
    """Against brute force, for similarities below, at and above the threshold."""
    for share in (0.6, 0.8, 0.9, 1.0):
        signatures_NP = planted(300, share)
        equal_NN = (signatures_NP[:, None] == signatures_NP[None]).mean(-1)
        estimate_NN = (equal_NN - 1 / 256) / (1 - 1 / 256)
        first_m, second_m = np.nonzero(np.triu(estimate_NN >= 0.8, 1))
        expected = set(zip(first_m.tolist(), second_m.tolist(), strict=True))
        first_M, second_M, similarity_M = similar_pairs(signatures_NP, 0.8)
        found = set(zip(first_M.tolist(), second_M.tolist(), strict=True))
        assert found <= expected and len(found) >= 0.98 * len(expected)
        assert np.allclose(similarity_M, estimate_NN[first_M, second_M])
        assert np.all(np.lexsort((first_M, second_M)) == np.arange(len(first_M)))


def test_a_crowd_costs_a_few_comparisons_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand copies of one document: each is compared with a few, and all but the first repeat it."""
    signatures_NP = np.repeat(planted(1, 1.0)[:1], 1000, axis=0)
    compared = []
    real = similar_signatures._similarity

    def count(signatures_NP: np.ndarray, first_M: np.ndarray, second_M: np.ndarray) -> np.ndarray:
        compared.append(len(first_M))
        return real(signatures_NP, first_M, second_M)

    monkeypatch.setattr(similar_signatures, "_similarity", count)
    first_M, second_M, _ = similar_pairs(signatures_NP, 0.8)
    num_bands = 128 // rows_of_band(0.8, 128)
    assert sum(compared) <= 1000 * (num_bands + 1) * 10
    repeats = repeated_by(first_M, second_M)
    assert sorted(repeats) == list(range(1, 1000))
    assert {int(first_M[pair]) for pair in repeats.values()} == {0}


def test_what_is_like_a_repetition_only_is_kept() -> None:
    """1 is like 0, and 2 is like 1 but not like 0: 2 stays."""
    first_M, second_M = np.array([0, 1, 2]), np.array([1, 2, 3])
    assert repeated_by(first_M, second_M) == {1: 0, 3: 2}


def test_no_documents_have_no_pairs() -> None:
    for count in (0, 1):
        first_M, second_M, _ = similar_pairs(np.zeros((count, 128), np.uint8), 0.8)
        assert not len(first_M) and not len(second_M)
