"""The nearest of a block's candidates, against a sort of each query's own."""

from __future__ import annotations

import numpy as np
import pytest

from mlpmem_ds.maths.candidates import CandidateBlock
from mlpmem_ds.maths.neighbours import MISSING, NO_BOUND

ID_BITS = 10


def make_block(seed: int, *, own: bool) -> tuple[CandidateBlock, list[list[tuple[int, int]]]]:
    """A block of five queries that probe three lists each, and each query's (rank, id) pairs."""
    generator = np.random.default_rng(seed)
    sizes_BP = generator.integers(0, 7, (5, 3))
    starts_BP = (np.cumsum(sizes_BP) - sizes_BP.ravel()).reshape(sizes_BP.shape)
    ranks = np.append(generator.integers(0, 6, sizes_BP.sum()), NO_BOUND).astype(np.int32)
    ids = generator.permutation(1 << ID_BITS)[:40].astype(np.int64)
    first_ids_BP = generator.integers(0, 30, sizes_BP.shape)
    pairs = [
        [
            (int(ranks[starts_BP[b, p] + i]), int(ids[first_ids_BP[b, p] + i]))
            for p in range(3)
            for i in range(sizes_BP[b, p])
        ]
        for b in range(5)
    ]
    own_ids_B = np.array([row[0][1] if row else -1 for row in pairs]) if own else None
    block = CandidateBlock(
        ranks=ranks,
        starts_BP=starts_BP,
        sizes_BP=sizes_BP,
        ids=ids,
        first_ids_BP=first_ids_BP,
        offsets_B=np.arange(5) << 40,
        own_ids_B=own_ids_B,
    )
    return block, pairs


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_are_the_least_pairs_of_rank_and_id(seed: int, k: int, own: bool) -> None:
    block, pairs = make_block(seed, own=own)
    found = np.concatenate([block.nearest(rows, k, ID_BITS) for rows in block.split_rows()])
    for query, row in enumerate(pairs):
        hidden = block.own_ids_B[query] if block.own_ids_B is not None else None
        expected = sorted((query << 40) + (rank << ID_BITS | key) for rank, key in row if key != hidden)[:k]
        assert found[query].tolist() == expected + [MISSING] * (k - len(expected))
