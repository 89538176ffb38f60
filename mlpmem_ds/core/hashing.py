"""Randomness that is a pure function of its keys: the same on every machine, for any version of NumPy."""

from __future__ import annotations

import hashlib

import numpy as np

from mlpmem_ds.core.blocks import Block

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 1 << 22
_KEPT_ITEMS = 1 << 20
"""items up to which a permutation is an array of 8 bytes an item"""
_ROUNDS = 6
_SCANNED = 1 << 30
"""positions up to which a few of them are drawn by a look at each: 40 s; 2e11 would take two hours"""


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


class Permutation:
    """A permutation of range(count), a pure function of `keys`.

    Up to 2^20 items it is the array of `shuffled`. Above that it is a Feistel network on the smallest even
    number of bits that can hold an item, applied again to what lies outside the range (cycle walking: less
    than four times on average; Black and Rogaway 2002): no memory, and the same cost at any count.
    """

    def __init__(self, count: int, *keys: int) -> None:
        self.count = count
        self._kept = shuffled(count, *keys) if count <= _KEPT_ITEMS else None
        self._half_bits = np.uint64((max(count - 1, 1).bit_length() + 1) // 2)
        self._round_keys = mix(_state(keys) + np.arange(_ROUNDS, dtype=np.uint64) * _GOLDEN)

    def items(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the items at the places [start, stop)."""
        if self._kept is not None:
            return self._kept[start:stop]
        return self._walk(np.arange(start, stop, dtype=np.uint64), self._round_keys)

    def place_of(self, item: int) -> int:
        """Where an item stands."""
        if self._kept is not None:
            return int(np.flatnonzero(self._kept == item)[0])
        return int(self._walk(np.array([item], np.uint64), self._round_keys[::-1], inverse=True)[0])

    def _walk(self, numbers_n: np.ndarray, keys: np.ndarray, *, inverse: bool = False) -> np.ndarray:
        numbers_n = self._network(numbers_n, keys, inverse)
        outside = np.flatnonzero(numbers_n >= self.count)
        while len(outside):
            numbers_n[outside] = self._network(numbers_n[outside], keys, inverse)
            outside = outside[numbers_n[outside] >= self.count]
        return numbers_n.astype(np.int64)

    def _network(self, numbers_n: np.ndarray, keys: np.ndarray, inverse: bool) -> np.ndarray:
        half = self._half_bits
        mask = np.uint64((1 << int(half)) - 1)
        high_n, low_n = numbers_n >> half, numbers_n & mask
        for key in keys:
            if inverse:
                high_n, low_n = low_n ^ (mix(high_n + key) & mask), high_n
            else:
                high_n, low_n = low_n, high_n ^ (mix(low_n + key) & mask)
        merged_n: np.ndarray = (high_n << half) | low_n
        return merged_n


def sample_positions(num_positions: int, count: int, *, seed: int, block: Block | None = None) -> np.ndarray:
    """About `count` of the positions [0, num_positions), all where there are not more: int64, ascending.

    Whether a position is drawn depends on its number, `seed` and the fraction alone. With `block` only those
    that lie in it are given.
    """
    first, stop = (0, num_positions) if block is None else block
    if count >= num_positions:
        return np.arange(first, stop)
    threshold = np.uint64(int(count / num_positions * 2**64))
    drawn = []
    for start in range(first, stop, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, stop), dtype=np.uint64)
        drawn.append(np.flatnonzero(mix(positions * _GOLDEN + _state((seed,))) < threshold) + start)
    return np.concatenate(drawn)


def draw_positions(num_positions: int, count: int, *, seed: int) -> np.ndarray:
    """A few of the positions [0, num_positions), about `count`, all where there are not more: int64,
    ascending.

    Those of `sample_positions` up to 2^30; of more exactly `count`, at the same cost for any number.
    """
    if num_positions <= _SCANNED:
        return sample_positions(num_positions, count, seed=seed)
    return np.sort(Permutation(num_positions, seed).items(0, count))


def _state(keys: tuple[int, ...]) -> np.uint64:
    state = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = mix(state ^ np.uint64(key))
    return state[0]
