"""Benchmark `scale`, measures of building an index: what a rank reads, sends and holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlpmem_ds.benchmarks.scale.measure import Measure
from mlpmem_ds.core.blocks import Block, split_blocks
from mlpmem_ds.engines.collectives.alone import Alone
from mlpmem_ds.maths.kmeans import Share, integer_centroids
from mlpmem_ds.stages.index.factory import choose_num_shards, index_bytes, make_index
from mlpmem_ds.stages.index.training import sample_of_keys
from mlpmem_ds.stages.keys.plan import auto_unit_positions

_FACTORY, _DIM = "IVF262144,PQ64", 256  # as chosen for 5e9 keys


class _Keys:
    """Keys of this geometry, and no file: a gathered row has no numbers."""

    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions

    @property
    def blocks(self) -> list[Block]:
        return split_blocks(self.num_positions, auto_unit_positions(self.num_positions))

    def gather(self, array: str, positions_N: np.ndarray) -> np.ndarray:
        return np.empty((len(positions_N), 0), np.int8)


class _OneOf(Alone):
    """Rank 0 of several, whose sums are its own; counts the bytes that it gives to a sum."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.bytes_summed = size, 0

    def sum(self, array: np.ndarray) -> np.ndarray:
        self.bytes_summed += array.nbytes
        return array


def sample_rows_of_a_rank(_work: Path, *, num_positions: int = 5 * 10**9, size: int = 32) -> float:
    """Keys that one rank reads to train, over its even part of the sample."""
    count = make_index(_FACTORY, _DIM, num_positions).num_training_vectors
    keys: Any = _Keys(num_positions)
    sample = sample_of_keys(keys, count, _OneOf(size))
    return len(sample.numbers_n) / (count / size)


def bytes_summed_by_an_iteration(_work: Path, *, num_lists: int = 256, num_dims: int = _DIM) -> float:
    """Bytes that a rank gives to the sums of an iteration of k-means, over int32 centroids: more keys of a
    rank do not make them more."""
    generator = np.random.default_rng(0)
    given = []
    for iterations in (1, 2):
        codes_ND = generator.integers(-127, 128, (64 * num_lists, num_dims), dtype=np.int8)
        ranks = _OneOf(1)
        integer_centroids(Share.whole(codes_ND), num_lists, seed=0, ranks=ranks, iterations=iterations)
        given.append(ranks.bytes_summed)
    return (given[1] - given[0]) / (4 * num_lists * num_dims)


def gigabytes_of_a_shard(_work: Path, *, num_positions: int = 5 * 10**9) -> float:
    """What a rank holds to fill one shard, and loses when it is killed."""
    num_lists = make_index(_FACTORY, _DIM, num_positions).num_lists
    num_shards = choose_num_shards(num_positions, num_lists)
    return index_bytes(_FACTORY, _DIM, num_positions, num_shards) / (num_shards + 1) / 1e9


MEASURES: tuple[Measure, ...] = (
    Measure(
        name="sample_rows_per_rank_5e9",
        function=sample_rows_of_a_rank,
        goal=1.05,
        direction="at most",
        meaning="keys that one of 32 ranks reads to train on, over 1/32 of the sample of 5e9 keys",
    ),
    Measure(
        name="kmeans_bytes_per_iteration",
        function=bytes_summed_by_an_iteration,
        goal=1.05,
        direction="at most",
        meaning="bytes that a rank gives to the sums of an iteration, over int32 centroids; no keys",
    ),
    Measure(
        name="shard_gigabytes_5e9",
        function=gigabytes_of_a_shard,
        goal=4,
        direction="at most",
        meaning="1e9 bytes of a shard of 5e9 keys, which a rank fills in memory",
    ),
)
