"""MinHash signatures → pairs that are alike, and which documents repeat an earlier one.

A signature holds the low 8 bits of P minimum hashes (b-bit minwise hashing, Li and König 2010): where two
texts have the Jaccard similarity J, each of their bytes is equal with the probability J + (1 - J) / 256.
Candidates are found by bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4): they are
documents of which all R bytes of a band are equal. Each candidate is then judged by its whole signature.

N documents, P bytes of a signature, R rows of a band, M pairs.
"""

from __future__ import annotations

import numpy as np

_CHANCE = 1 / 256  # that two bytes are equal which have nothing to do with each other
_RECALL = 0.99  # of pairs at the threshold: with 128 bytes and .8, 21 bands of 6 rows
_MAX_ROWS = 8  # a band is one uint64
_WINDOW = 8
"""documents before it in a band with which each is compared, besides the band's first: linear also where a
million documents share a band"""
_AT_ONCE = 1 << 16  # pairs


def rows_of_band(threshold: float, num_hashes: int) -> int:
    """The most rows with which a pair at the threshold is still a candidate in 99 of 100 cases."""
    for rows in range(min(_MAX_ROWS, num_hashes), 1, -1):
        if 1 - (1 - threshold**rows) ** (num_hashes // rows) >= _RECALL:
            return rows
    return 1


def similar_pairs(signatures_NP: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs whose estimated similarity is at least `threshold`.

    Args:
        signatures_NP: uint8, in the order in which documents are kept.
        threshold: Jaccard similarity, in (0, 1].

    Returns:
        (first_M, second_M int64, similarity_M float64), first < second, in the order (second, first). Every
        document is compared with few others of its bands, so that of a group of many not all pairs are named.
    """
    num_documents, num_hashes = signatures_NP.shape
    rows = rows_of_band(threshold, num_hashes)
    found_M = np.empty(0, np.int64)  # second * N + first
    for start in range(0, num_hashes - rows + 1, rows):
        packed_N8 = np.zeros((num_documents, 8), np.uint8)
        packed_N8[:, :rows] = signatures_NP[:, start : start + rows]
        for first_m, second_m in _candidates(packed_N8.view(np.uint64)[:, 0]):
            alike_m = _similarity(signatures_NP, first_m, second_m) >= threshold
            pairs_m = second_m[alike_m] * num_documents + first_m[alike_m]
            found_M = np.union1d(found_M, pairs_m) if len(pairs_m) else found_M
    second_M, first_M = np.divmod(found_M, max(num_documents, 1))
    return first_M, second_M, _similarity(signatures_NP, first_M, second_M)


def _candidates(bands_N: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs (earlier, later) of documents with one band, in lists of pairs that lie equally far apart."""
    order_N = np.argsort(bands_N, kind="stable")  # equal ones stay in their order
    sorted_N = bands_N[order_N]
    lists: list[tuple[np.ndarray, np.ndarray]] = []
    for lag in range(1, _WINDOW + 1):
        at_m = np.flatnonzero(sorted_N[lag:] == sorted_N[:-lag])
        if not len(at_m):
            return lists
        lists.append((order_N[at_m], order_N[at_m + lag]))
    starts_N = np.maximum.accumulate(
        np.where(np.diff(sorted_N, prepend=~sorted_N[:1]) != 0, np.arange(len(sorted_N)), 0)
    )
    far_m = np.flatnonzero(np.arange(len(sorted_N)) - starts_N > _WINDOW)
    lists.append((order_N[starts_N[far_m]], order_N[far_m]))
    return lists


def _similarity(signatures_NP: np.ndarray, first_M: np.ndarray, second_M: np.ndarray) -> np.ndarray:
    """float64 [M]: the estimated Jaccard similarity; its standard error is at most .5 / sqrt(P)."""
    equal_M = np.empty(len(first_M))
    for start in range(0, len(first_M), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        equal_M[part] = (signatures_NP[first_M[part]] == signatures_NP[second_M[part]]).mean(axis=1)
    similarity_M: np.ndarray = (equal_M - _CHANCE) / (1 - _CHANCE)
    return similarity_M


def repeated_by(first_M: np.ndarray, second_M: np.ndarray) -> dict[int, int]:
    """Document → number of the pair that says what it repeats: the first document like it that is kept.

    Pairs come in the order of `similar_pairs`. What is like a document that repeats another is not thereby a
    repetition: only documents that are kept count.
    """
    repeats: dict[int, int] = {}
    for number, (first, second) in enumerate(zip(first_M.tolist(), second_M.tolist(), strict=True)):
        if second not in repeats and first not in repeats:
            repeats[second] = number
    return repeats
