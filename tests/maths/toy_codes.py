"""int8 codes in clusters, and their exact distances."""

from __future__ import annotations

import numpy as np

NUM_VECTORS, DIM = 2500, 12


def codes(num_vectors: int = NUM_VECTORS, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).integers(-60, 60, size=(40, DIM))
    noise = generator.integers(-9, 10, (num_vectors, DIM))
    return (centres[generator.integers(0, 40, num_vectors)] + noise).astype(np.int8)


def exact_squared(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    return ((vectors[:, None].astype(np.int64) - others[None].astype(np.int64)) ** 2).sum(-1)
