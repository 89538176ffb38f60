"""k-means in whole numbers, in one level and in two: the same from any number of threads and ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mlpmem_ds.maths.kmeans import Ranks, Share, integer_centroids, two_level_centroids

from ..thread_ranks import on_thread_ranks
from .toy_codes import DIM, codes, exact_squared


class One:
    rank, size = 0, 1

    def sum(self, array: np.ndarray) -> np.ndarray:
        return array

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        return list(parts)


def centroids(vectors: np.ndarray, num_lists: int, **options: Any) -> np.ndarray:
    return integer_centroids(Share.whole(vectors), num_lists, ranks=One(), **options)


@pytest.mark.parametrize("above", [60, 8])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_together_give_the_centroids_of_one(size: int, above: int) -> None:
    """Vectors dealt in pieces of 37; lists of which some stay empty; one rank may have none at all."""
    vectors = np.repeat(codes(60), 5, axis=0)
    expected = centroids(vectors, 60, seed=2, two_level_above=above)

    def work(ranks: Ranks) -> np.ndarray:
        numbers = np.flatnonzero(np.arange(len(vectors)) // 37 % min(ranks.size, 7) == ranks.rank)
        share = Share(vectors_nD=vectors[numbers], numbers_n=numbers, total=len(vectors))
        return integer_centroids(share, 60, seed=2, ranks=ranks, two_level_above=above)

    assert all(np.array_equal(found, expected) for found in on_thread_ranks(size, work))


@pytest.mark.parametrize("stride", [1, 3])
def test_what_ranks_hold_together_is_gathered_in_order(stride: int) -> None:
    vectors = codes(50)

    def work(ranks: Ranks) -> np.ndarray:
        numbers = np.flatnonzero(np.arange(50) // 7 % 3 == ranks.rank)
        share = Share(vectors_nD=vectors[numbers], numbers_n=numbers, total=50).every(stride)
        return share.on_first(ranks)

    first, *others = on_thread_ranks(3, work)
    assert np.array_equal(first, vectors[::stride]) and not any(map(len, others))


@pytest.mark.parametrize("two_level_above", [64, 8])
def test_k_means_is_the_same_on_any_number_of_threads(two_level_above: int) -> None:
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(centroids(codes(), 64, seed=3, two_level_above=two_level_above))
    torch.set_num_threads(threads)
    assert found[0].dtype == np.int8 and found[0].shape == (64, DIM) and np.array_equal(*found)


def test_two_levels_are_nearly_as_good_as_one() -> None:
    other = codes(seed=8)  # not trained on
    errors = [
        exact_squared(other, centroids(codes(), 100, seed=1, two_level_above=above)).min(1).mean()
        for above in (100, 99)
    ]
    drawn = exact_squared(other, codes()[:100]).min(1).mean()
    assert errors[1] < 1.1 * errors[0] < 0.8 * drawn


def test_a_list_for_each_vector() -> None:
    few = np.unique(codes(30), axis=0)
    for above in (len(few), 5):
        found = centroids(few, len(few), seed=0, two_level_above=above)
        assert np.array_equal(np.unique(found, axis=0), few)


def test_shares_of_the_second_level_follow_the_groups() -> None:
    """One group of 90 and one of 10 vectors share 20 lists as 18 and 2."""
    vectors = np.concatenate([np.zeros((90, 2)), np.full((10, 2), 100)]).astype(np.float32)
    calls = []

    def cluster(part: Share, count: int, _: object) -> np.ndarray:
        calls.append((part.total, count))
        first = np.array([[0, 0], [100, 100]], np.float32)
        return first[:count] if len(calls) == 1 else part.vectors_nD[:count]

    vectors = vectors[np.random.default_rng(0).permutation(100)]
    cluster_two = two_level_centroids(
        Share.whole(vectors), 5, cluster, ranks=One()
    )  # floor(sqrt(5)) = 2 first
    assert calls == [(100, 2), (90, 4), (10, 1)] and len(cluster_two) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_the_same() -> None:
    vectors = codes()
    for above in (64, 8):
        trained = [
            integer_centroids(
                Share.whole(vectors), 64, seed=3, ranks=One(), device=device, two_level_above=above
            )
            for device in ("cpu", "cuda:0")
        ]
        np.testing.assert_array_equal(*trained)
