"""Randomness that is a pure function of its keys: the same on every machine, for any version of NumPy."""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 22


def hash_fraction(key: str | int, seed: int = 0) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def mix(numbers: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), elementwise: a bijection of uint64 that looks
    random."""
    numbers = numbers + _GOLDEN
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def shuffled(count: int, *keys: int) -> np.ndarray:
    """int64 [count]: a permutation of range(count), a pure function of `keys`."""
    scores = mix(np.arange(count, dtype=np.uint64) * _GOLDEN + _state(keys))
    return np.argsort(scores, kind="stable")


def sample_positions(num_positions: int, count: int, *, seed: int) -> np.ndarray:
    """About `count` of the positions [0, num_positions), all where there are not more: int64, ascending.

    Whether a position is drawn depends on its number, `seed` and the fraction alone.
    """
    if count >= num_positions:
        return np.arange(num_positions)
    threshold = np.uint64(int(count / num_positions * 2**64))
    drawn = []
    for start in range(0, num_positions, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, num_positions), dtype=np.uint64)
        drawn.append(np.flatnonzero(mix(positions * _GOLDEN + _state((seed,))) < threshold) + start)
    return np.concatenate(drawn)


def _state(keys: tuple[int, ...]) -> np.uint64:
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix(state ^ np.uint64(key))
    return state[0]
