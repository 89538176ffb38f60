"""Pipeline: keys → **coarse lists** → index. k-means over int8 codes in whole numbers, by all ranks together.

A centroid of codes is rounded to int8 in every step, so that each comparison is of exact integers; what ranks
add up are sums of codes and counts. So the centroids are the same, bit for bit, for any number of ranks and
threads and any device.

Shape legend: N vectors, n those of a rank, D dimensions, L centroids (lists).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mlpmem_ds.maths.centroids import nearest_centroids

Array: TypeAlias = np.ndarray[Any, Any]
Device: TypeAlias = torch.device | str

TWO_LEVEL_ABOVE = 65_536
"""lists; one level then costs 64 · L² · D products an iteration: 70 s of one core at L = 65,536"""
ITERATIONS = 10
_FIRST_LEVEL_POINTS = 256  # points a centroid of the first of two levels


class Ranks(Protocol):
    """What ranks do together here; `engines.collectives.ranks` has more of it."""

    rank: int
    size: int

    def sum(self, array: Array) -> Array: ...

    def gather(self, value: Any) -> list[Any]: ...

    def exchange(self, parts: Sequence[Array]) -> list[Array]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """A rank's part [n, D] of the vectors 0 … `total` - 1, which all ranks hold together: `numbers_n`, int64,
    ascending, says which of them."""

    vectors_nD: Array
    numbers_n: Array
    total: int

    @classmethod
    def whole(cls, vectors_ND: Array) -> Share:
        """All of them, on one rank."""
        return cls(vectors_nD=vectors_ND, numbers_n=np.arange(len(vectors_ND)), total=len(vectors_ND))

    def every(self, stride: int) -> Share:
        """Of the vectors 0, `stride`, 2 · `stride`, … this rank's part, numbered 0, 1, 2, …"""
        if stride == 1:
            return self
        chosen = self.numbers_n % stride == 0
        return Share(
            vectors_nD=self.vectors_nD[chosen],
            numbers_n=self.numbers_n[chosen] // stride,
            total=-(-self.total // stride),
        )

    def at(self, wanted_W: Array, ranks: Ranks) -> Array:
        """The vectors [W, D] of these numbers (ascending), on every rank."""
        rows = np.zeros((len(wanted_W), *self.vectors_nD.shape[1:]), self.vectors_nD.dtype)
        _, mine, places = np.intersect1d(self.numbers_n, wanted_W, assume_unique=True, return_indices=True)
        rows[places] = self.vectors_nD[mine]
        return ranks.sum(rows)  # each row is zero on all ranks but one

    def on_first(self, ranks: Ranks) -> Array:
        """All vectors [N, D] in order on rank 0, none on the others."""
        if ranks.size == 1:
            return self.vectors_nD
        vectors_ND = np.concatenate(_to_rank_0(np.ascontiguousarray(self.vectors_nD), ranks))
        return vectors_ND[np.argsort(np.concatenate(_to_rank_0(self.numbers_n, ranks)))]


def integer_centroids(
    share: Share,
    num_lists: int,
    *,
    seed: int,
    ranks: Ranks,
    iterations: int = ITERATIONS,
    device: Device = "cpu",
    two_level_above: int = TWO_LEVEL_ABOVE,
) -> Array:
    """k-means over int8 codes: centroids int8 [L, D] on every rank, bit for bit the same on any machine.

    Starts from L of the codes drawn by `seed`; a list that stays empty takes the code farthest from its
    centroid. With more lists than `two_level_above`: about sqrt(L) centroids first, then lists within each in
    proportion to its codes, which costs L · sqrt(L) in place of L² (the idea is that of faiss's
    `two_level_clustering`). All ranks do the first level together, and each group of the second belongs to
    one rank.
    """

    def cluster(part: Share, count: int, together: Ranks) -> Array:
        return _one_level(part, count, seed, iterations, device, together)

    if num_lists <= two_level_above:
        return cluster(share, num_lists, ranks)
    return two_level_centroids(share, num_lists, cluster, ranks=ranks, device=device)


def two_level_centroids(
    share: Share,
    num_lists: int,
    cluster: Callable[[Share, int, Ranks], Array],
    *,
    ranks: Ranks,
    device: Device = "cpu",
) -> Array:
    """About sqrt(L) centroids of the vectors, then lists within each group in proportion to its size: [L, D],
    on every rank.

    ``cluster(share, count, ranks)`` gives the `count` centroids of vectors that these ranks hold together.
    """
    num_first = math.isqrt(num_lists)
    stride = max(1, share.total // (_FIRST_LEVEL_POINTS * num_first))
    first_FD = torch.from_numpy(cluster(share.every(stride), num_first, ranks)).to(device)
    group_n = nearest_centroids(torch.from_numpy(_writable(share.vectors_nD)), first_FD, 1)[0][:, 0]
    ends = np.cumsum(ranks.sum(np.bincount(group_n, minlength=num_first)))
    ends_of_lists = ends * num_lists // share.total  # L in all, each group's part rounded along the way
    lists_of_group = np.diff(ends_of_lists, prepend=0).tolist()
    own = {
        group: cluster(Share.whole(vectors_ND), lists_of_group[group], _OneRank())
        for group, vectors_ND in _own_groups(share, group_n, num_first, ranks)
        if lists_of_group[group]
    }
    centroids_by_group: dict[int, Array] = {}
    for found in ranks.gather(own):
        centroids_by_group |= found
    return np.concatenate([centroids_by_group[group] for group in sorted(centroids_by_group)])


class _OneRank:
    """A group of the second level has one rank."""

    rank, size = 0, 1

    def sum(self, array: Array) -> Array:
        return array

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(self, parts: Sequence[Array]) -> list[Array]:
        return list(parts)


def _own_groups(share: Share, group_n: Array, num_groups: int, ranks: Ranks) -> list[tuple[int, Array]]:
    """The groups of this rank, every size-th, each with all its vectors in order."""
    owner_n = group_n % ranks.size
    chosen = [np.flatnonzero(owner_n == rank) for rank in range(ranks.size)]
    vectors_ND = np.concatenate(ranks.exchange([share.vectors_nD[rows] for rows in chosen]))
    places = np.stack([group_n, share.numbers_n], axis=1)
    groups_N, numbers_N = np.concatenate(ranks.exchange([places[rows] for rows in chosen])).T
    order_N = np.lexsort((numbers_N, groups_N))
    ends = np.cumsum(np.bincount(groups_N, minlength=num_groups))
    rows_of_group = np.split(order_N, ends[:-1])
    return [(group, vectors_ND[rows_of_group[group]]) for group in range(ranks.rank, num_groups, ranks.size)]


def _one_level(
    share: Share, num_lists: int, seed: int, iterations: int, device: Device, ranks: Ranks
) -> Array:
    start_L = np.sort(np.random.default_rng(seed).choice(share.total, num_lists, replace=False))
    codes = torch.from_numpy(_writable(share.vectors_nD)).to(device)
    centroids = torch.from_numpy(share.at(start_L, ranks)).to(device)
    for _ in range(iterations):
        nearest_n1, distances_n1 = nearest_centroids(codes, centroids, 1)
        nearest_n = torch.from_numpy(nearest_n1[:, 0]).to(device)
        sums_LD = ranks.sum(_sums_of_lists(codes, nearest_n, num_lists).cpu().numpy())
        counts_L = ranks.sum(np.bincount(nearest_n1[:, 0], minlength=num_lists))
        divisors_L1 = torch.from_numpy(counts_L).to(device).clamp(min=1)[:, None]
        moved = (torch.from_numpy(sums_LD).to(device).double() / divisors_L1).round().to(torch.int8)
        empty = np.flatnonzero(counts_L == 0)
        if len(empty):
            farthest = _farthest(share, distances_n1[:, 0], len(empty), ranks)
            moved[torch.from_numpy(empty).to(device)] = torch.from_numpy(farthest).to(device)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.cpu().numpy()


def _farthest(share: Share, distances_n: Array, count: int, ranks: Ranks) -> Array:
    """The `count` vectors farthest from their centroids, the farthest first, ties to the lower number: int8
    [count, D] on every rank."""
    own = np.argsort(-distances_n, kind="stable")[:count]
    found = ranks.gather((distances_n[own], share.numbers_n[own], share.vectors_nD[own]))
    distances_c, numbers_c, vectors_cD = (np.concatenate(parts) for parts in zip(*found, strict=True))
    chosen: Array = vectors_cD[np.lexsort((numbers_c, -distances_c))[:count]]
    return chosen


def _sums_of_lists(codes: Tensor, nearest_n: Tensor, num_lists: int) -> Tensor:
    """int32 [L, D]: the sum of the codes of each list, block by block so that their int32 copy stays
    small."""
    sums_LD = torch.zeros((num_lists, codes.shape[1]), dtype=torch.int32, device=codes.device)
    step = 1 << 16
    for start in range(0, len(codes), step):
        sums_LD.index_add_(0, nearest_n[start : start + step], codes[start : start + step].to(torch.int32))
    return sums_LD


def _to_rank_0(array: Array, ranks: Ranks) -> list[Array]:
    return ranks.exchange([array] + [array[:0]] * (ranks.size - 1))


def _writable(array: Array) -> Array:
    """As torch takes it: not a read-only map."""
    return np.require(array, requirements=["C", "W"])
